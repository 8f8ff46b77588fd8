-- KEYS[2]: the event-id window; then the lists' keys, then the embeddings' keys, then keys to delete first.
-- ARGV[3]: the window's floor, ARGV[4]: n accepted ids, ARGV[5]: m lists, ARGV[6]: e embeddings;
-- then n pairs (offset, event id), m list values, e embedding values.
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local n, m, e = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local at = 6
for first = 1, 2 * n, 1000 do -- unpack holds a few thousand values at most
  redis.call('ZADD', KEYS[2], unpack(ARGV, at + first, at + math.min(first + 999, 2 * n)))
end
if n > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[3])
end
at = at + 2 * n
for i = 3 + m + e, #KEYS do
  redis.call('DEL', KEYS[i])
end
for i = 1, m do
  redis.call('SET', KEYS[2 + i], ARGV[at + i] .. stamp)
end
at = at + m
for i = 1, e do
  redis.call('SET', KEYS[2 + m + i], ARGV[at + i])
end
return {1, string.format('%.0f', us)}
