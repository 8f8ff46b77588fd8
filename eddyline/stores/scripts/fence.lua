-- Head of every write script. KEYS[1]: the fence. ARGV[1]: the expected fence ("" for none),
-- ARGV[2]: the new fence, which the script sets last. If the stored fence differs, nothing is
-- written and the stored fence is returned.
local found = redis.call('GET', KEYS[1]) or ''
if found ~= ARGV[1] then
  return {0, found}
end
