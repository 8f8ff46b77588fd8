-- KEYS[2]: the index of buckets (sorted set, number by number), KEYS[3] …: the buckets that grow.
-- ARGV[3]: buckets kept, ARGV[4]: key prefix of a bucket, ARGV[5]: items of a bucket at most; then
-- for each bucket: its number, n items, n pairs (item id, thousandths of a click).
local items_max, i = tonumber(ARGV[5]), 6
while i <= #ARGV do
  local bucket, last = ARGV[4] .. ARGV[i], i + 1 + 2 * tonumber(ARGV[i + 1])
  redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i])
  for j = i + 2, last, 2 do
    redis.call('ZINCRBY', bucket, ARGV[j + 1], ARGV[j])
  end
  local more = redis.call('ZCARD', bucket) - items_max
  if more > 0 then
    redis.call('ZREMRANGEBYRANK', bucket, 0, more - 1)
  end
  i = last + 1
end
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
if newest then
  local last_gone = string.format('%.0f', newest - ARGV[3])
  for _, bucket in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', last_gone)) do
    -- KEYS does not name it: while a cluster moves the slot it may be on the other node; the next
    -- call deletes it then.
    if type(redis.pcall('UNLINK', ARGV[4] .. bucket)) == 'number' then
      redis.call('ZREM', KEYS[2], bucket)
    end
  end
end
return {1, ''}
