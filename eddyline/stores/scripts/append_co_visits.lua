-- KEYS[2] …: co-visitation rows, see `schema.co_visits`. ARGV[3]: from how many entries on a row is
-- compacted, ARGV[4]: after how many ms without a write a row ends, 0: never; then the entries to
-- append to each row. Gives the bytes of `co_visits.append`.
local row_max, idle_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
local half, count_max, at_once = math.floor(row_max / 2), 4294967295, 50
-- The least count that stays, and how many of the first keys that have it go.
local function limits(keys, milli)
  local counts, above, equal = {}, 0, 0
  for i, key in ipairs(keys) do
    counts[i] = milli[key]
  end
  table.sort(counts)
  local least = counts[#counts - half + 1]
  for _, count in ipairs(counts) do
    if count > least then
      above = above + 1
    elseif count == least then
      equal = equal + 1
    end
  end
  return least, above + equal - half
end
local function compact(row)
  local milli_sum, next_sum = struct.unpack('<dd', row)
  local keys, milli, nexts = {}, {}, {}
  for at = 17, #row, 16 * at_once do
    local n = math.min(at_once, (#row - at + 1) / 16)
    local values = {struct.unpack('<' .. string.rep('c8I4I4', n), row, at)}
    for i = 1, 3 * n, 3 do
      local key, m, c = values[i], values[i + 1], values[i + 2]
      milli_sum, next_sum = milli_sum + m, next_sum + c
      if milli[key] then
        milli[key], nexts[key] = milli[key] + m, nexts[key] + c
      else
        keys[#keys + 1], milli[key], nexts[key] = key, m, c
      end
    end
  end
  local least, skipped = 0, 0
  if #keys > half then
    least, skipped = limits(keys, milli)
  end
  local parts = {''}
  for _, key in ipairs(keys) do
    local m, c = milli[key], nexts[key]
    if m == least and skipped > 0 then
      skipped = skipped - 1
    elseif m >= least then
      m, c = math.min(m, count_max), math.min(c, count_max)
      milli_sum, next_sum = milli_sum - m, next_sum - c
      parts[#parts + 1] = key .. struct.pack('<I4I4', m, c)
    end
  end
  parts[1] = struct.pack('<dd', milli_sum, next_sum)
  return table.concat(parts)
end
local compacted, appended = {}, {}
for i = 2, #KEYS do
  local length, more = redis.call('STRLEN', KEYS[i]), ARGV[i + 3] -- fails for another type
  if length % 16 ~= 0 then
    return redis.error_reply('ERR a damaged row in ' .. KEYS[i])
  end
  if length == 0 then
    more = string.rep('\0', 16) .. more
  end
  if length + #more < 16 + 16 * row_max then
    appended[i] = more
  else
    compacted[i] = compact((redis.call('GET', KEYS[i]) or '') .. more)
  end
end
for i = 2, #KEYS do
  if appended[i] then
    redis.call('APPEND', KEYS[i], appended[i])
  else
    redis.call('SET', KEYS[i], compacted[i])
  end
  if idle_ms > 0 then
    redis.call('PEXPIRE', KEYS[i], ARGV[4])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
