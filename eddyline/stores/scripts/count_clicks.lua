-- KEYS[2]: the buckets' index (bucket numbers by themselves). ARGV[3]: buckets kept, ARGV[4]: the prefix of
-- a bucket's key; then triples (bucket number, item id, thousandths).
for i = 5, #ARGV, 3 do
  redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i])
  redis.call('ZINCRBY', ARGV[4] .. ARGV[i], ARGV[i + 2], ARGV[i + 1])
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
if newest then
  local last_gone = string.format('%.0f', newest - ARGV[3])
  for _, bucket in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', last_gone)) do
    redis.call('UNLINK', ARGV[4] .. bucket)
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', last_gone)
end
return {1, ''}
