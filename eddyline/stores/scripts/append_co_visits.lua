-- KEYS[2] …: co-visitation rows, see `schema.co_visits`. ARGV[3]: from how many entries on a row is
-- compacted, ARGV[4]: after how many ms without a write a row ends, 0: never; then the entries to
-- append to each row. Gives the bytes of `co_visits.append`.
local row_max, idle_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
local half, count_max = math.floor(row_max / 2), 4294967295
local function compact(row)
  local milli_sum, next_sum = struct.unpack('<dd', row)
  local keys, milli, nexts = {}, {}, {}
  for at = 17, #row, 16 do
    local key = string.sub(row, at, at + 7)
    local m, c = struct.unpack('<I4I4', row, at + 8)
    milli_sum, next_sum = milli_sum + m, next_sum + c
    if milli[key] then
      milli[key], nexts[key] = milli[key] + m, nexts[key] + c
    else
      keys[#keys + 1], milli[key], nexts[key] = key, m, c
    end
  end
  local kept = #keys
  if kept > half then
    -- By numbers: the order of strings depends on the server's locale.
    table.sort(keys, function(a, b)
      if milli[a] ~= milli[b] then
        return milli[a] > milli[b]
      end
      local low_a, high_a = struct.unpack('<I4I4', a)
      local low_b, high_b = struct.unpack('<I4I4', b)
      return high_a < high_b or high_a == high_b and low_a < low_b
    end)
    kept = half
  end
  local parts = {''}
  for i = 1, kept do
    local key = keys[i]
    local m, c = math.min(milli[key], count_max), math.min(nexts[key], count_max)
    milli_sum, next_sum = milli_sum - m, next_sum - c
    parts[i + 1] = key .. struct.pack('<I4I4', m, c)
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
