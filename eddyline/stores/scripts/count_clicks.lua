-- KEYS[2]: the buckets' index (bucket numbers by themselves), then the buckets that are added to. ARGV[3]:
-- buckets kept, ARGV[4]: the prefix of a bucket's key, ARGV[5]: the most items of a bucket; then triples (bucket
-- number, item id, thousandths).
local items_max, before = tonumber(ARGV[5]), nil
for i = 6, #ARGV, 3 do
  local bucket = ARGV[4] .. ARGV[i]
  if ARGV[i] ~= before then
    redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i])
  end
  redis.call('ZINCRBY', bucket, ARGV[i + 2], ARGV[i + 1])
  if i + 3 > #ARGV or ARGV[i + 3] ~= ARGV[i] then -- the last one of its bucket
    local more = redis.call('ZCARD', bucket) - items_max
    if more > 0 then
      redis.call('ZREMRANGEBYRANK', bucket, 0, more - 1)
    end
  end
  before = ARGV[i]
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
if newest then
  local last_gone = string.format('%.0f', newest - ARGV[3])
  for _, bucket in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', last_gone)) do
    -- Its key was not named: where a cluster just moves the slot it may be elsewhere, and goes the next time.
    if type(redis.pcall('UNLINK', ARGV[4] .. bucket)) == 'number' then
      redis.call('ZREM', KEYS[2], bucket)
    end
  end
end
return {1, ''}
