-- ARGV[3]: n profiles, ARGV[4]: keys to delete; KEYS[2] …: n profile keys, then the keys to delete;
-- ARGV[5] …: n profile values.
local n, gone = tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 1, n do
  redis.call('SET', KEYS[1 + i], ARGV[4 + i])
end
for i = 1, gone do
  redis.call('DEL', KEYS[1 + n + i])
end
return {1, ''}
