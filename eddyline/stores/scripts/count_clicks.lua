-- KEYS[2]: the index of buckets (sorted set, number by number), KEYS[3] …: the n buckets that grow,
-- then their n versions. ARGV[3]: buckets kept, ARGV[4]: key prefix of the slot, ARGV[5]: items of
-- a bucket at most; then for each bucket: its number, n items, n pairs (item id, thousandths of a
-- click). A version never repeats: it is the time and the new fence of the write.
for i = 3, 2 + (#KEYS - 2) / 2 do
  redis.call('ZCARD', KEYS[i]) -- fails for a key of another type
end
local stored = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
if stored and not string.match(stored, '^-?%d+$') then
  return redis.error_reply('ERR a foreign member ' .. stored .. ' in ' .. KEYS[2])
end
local items_max, newest, buckets, i = tonumber(ARGV[5]), tonumber(stored), {}, 6
while i <= #ARGV do
  local number, last = tonumber(ARGV[i]), i + 1 + 2 * tonumber(ARGV[i + 1])
  newest = math.max(newest or number, number)
  buckets[#buckets + 1] = {number, i, last}
  i = last + 1
end
local time = redis.call('TIME')
local version = time[1] .. '.' .. time[2] .. ' ' .. KEYS[1] .. ' ' .. ARGV[2]
local last_gone = newest and newest - tonumber(ARGV[3])
local old = {}
if newest then
  old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', last_gone))
end
for _, bucket in ipairs(buckets) do
  local number, first, last = unpack(bucket)
  if number > last_gone then
    local key = ARGV[4] .. 'popular:' .. ARGV[first]
    redis.call('ZADD', KEYS[2], ARGV[first], ARGV[first])
    for j = first + 2, last, 2 do
      redis.call('ZINCRBY', key, ARGV[j + 1], ARGV[j])
    end
    local more = redis.call('ZCARD', key) - items_max
    if more > 0 then
      redis.call('ZREMRANGEBYRANK', key, 0, more - 1)
    end
    redis.call('SET', ARGV[4] .. 'version:' .. ARGV[first], version)
  end
end
for _, bucket in ipairs(old) do
  -- KEYS does not name them: while a cluster moves the slot they may be on the other node; the next
  -- call deletes them then.
  local keys = {ARGV[4] .. 'popular:' .. bucket, ARGV[4] .. 'version:' .. bucket}
  if type(redis.pcall('UNLINK', unpack(keys))) == 'number' then
    redis.call('ZREM', KEYS[2], bucket)
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
