-- KEYS[2]: the index of buckets (sorted set, number by number), KEYS[3]: the index of sums by
-- events (sorted set: "events" by the number of events; half-life by that number when it was
-- written last),
-- KEYS[4] …: for each half-life two sets of sums, of epochs with an even and with an odd number,
-- then the n buckets that grow, then their n versions.
-- ARGV[3]: buckets kept, ARGV[4]: key prefix of the slot, ARGV[5]: items of a bucket or set at
-- most, ARGV[6]: item slots, ARGV[7]: number of half-lives, ARGV[8]: number of events; then the
-- half-lives (events of all slots), the item of each event, and for each bucket: its number,
-- n items, n pairs (item id, thousandths of a click).
-- A version never repeats: it is the time and the new fence of the write.
local slots, half_lives, events = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local first_item, first_bucket = 9 + half_lives, 4 + 2 * half_lives
for i = 4, first_bucket - 1 + (#KEYS - first_bucket + 1) / 2 do
  redis.call('ZCARD', KEYS[i]) -- fails for a key of another type
end
local stored = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
if stored and not string.match(stored, '^-?%d+$') then
  return redis.error_reply('ERR a foreign member ' .. stored .. ' in ' .. KEYS[2])
end
local written, trend = {}, redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', '+inf', 'WITHSCORES')
for j = 1, #trend, 2 do
  if trend[j] ~= 'events' and not string.match(trend[j], '^%d+$') then
    return redis.error_reply('ERR a foreign member ' .. trend[j] .. ' in ' .. KEYS[3])
  end
  written[trend[j]] = tonumber(trend[j + 1])
end
local items_max, newest, buckets = tonumber(ARGV[5]), tonumber(stored), {}
local i = first_item + events
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
local function trim(key)
  local more = redis.call('ZCARD', key) - items_max
  if more > 0 then
    redis.call('ZREMRANGEBYRANK', key, 0, more - 1)
  end
end
for _, bucket in ipairs(buckets) do
  local number, first, last = unpack(bucket)
  if number > last_gone then
    local key = ARGV[4] .. 'popular:' .. ARGV[first]
    redis.call('ZADD', KEYS[2], ARGV[first], ARGV[first])
    for j = first + 2, last, 2 do
      redis.call('ZINCRBY', key, ARGV[j + 1], ARGV[j])
    end
    trim(key)
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
-- KEYS does not name these sets either.
local function end_sums(name)
  local head = ARGV[4] .. 'trend:' .. name
  if type(redis.pcall('UNLINK', head .. ':0', head .. ':1')) == 'number' then
    redis.call('ZREM', KEYS[3], name)
    return true
  end
end
if half_lives == 0 and #trend > 0 then
  -- No recall path needs the sums any more.
  local all = true
  for name in pairs(written) do
    all = (name == 'events' or end_sums(name)) and all
  end
  if all then
    redis.call('UNLINK', KEYS[3])
  end
end
-- The rules are those of `schema.event_decay`.
if events > 0 then
  local before, slowest = written['events'] or 0, 0
  local after = before + events
  for h = 1, half_lives do
    local name, sets = ARGV[8 + h], 2 + 2 * h
    local half_life = tonumber(name) / slots
    local epoch_events = 32 * half_life
    local epoch = written[name] and math.floor((written[name] - 1) / epoch_events)
    -- Of this call, to change each item of a set once.
    local items, sums = {}, {}
    local function add(key)
      for _, item in ipairs(items) do
        redis.call('ZINCRBY', key, sums[item], item)
      end
      items, sums = {}, {}
    end
    for n = 0, events - 1 do
      local now = math.floor((before + n) / epoch_events)
      if now ~= epoch then
        if #items > 0 then
          add(KEYS[sets + epoch % 2])
        end
        -- The set of the epoch before stays; the other one is two epochs old.
        redis.call('UNLINK', KEYS[sets + now % 2])
        if epoch ~= now - 1 then
          redis.call('UNLINK', KEYS[sets + (now + 1) % 2])
        end
        epoch = now
      end
      local item = ARGV[first_item + n]
      if not sums[item] then
        items[#items + 1] = item
      end
      sums[item] = (sums[item] or 0) + 2 ^ ((before + n - now * epoch_events) / half_life)
    end
    add(KEYS[sets + epoch % 2])
    trim(KEYS[sets])
    trim(KEYS[sets + 1])
    redis.call('ZADD', KEYS[3], after, name)
    slowest, written[name] = math.max(slowest, half_life), nil
  end
  written['events'] = nil
  for name, last in pairs(written) do
    -- A half-life of other settings ends with its epoch.
    if after - last >= 32 * math.min(slowest, tonumber(name) / slots) then
      end_sums(name)
    end
  end
  redis.call('ZADD', KEYS[3], after, 'events')
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
