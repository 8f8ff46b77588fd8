-- Put before every write script. KEYS[1]: the fence. ARGV[1]: the fence that was read ("" for absent),
-- ARGV[2]: the new one. A fence that differs refuses the whole write and returns what was found.
local found = redis.call('GET', KEYS[1]) or ''
if found ~= ARGV[1] then
  return {0, found}
end
redis.call('SET', KEYS[1], ARGV[2])
