-- KEYS[2] …: co-visitation rows, see `schema.co_visits`. ARGV[3]: from how many entries on a row is
-- compacted, ARGV[4]: after how many ms without a write a row ends, 0: never; ARGV[5]: so many of
-- the first rows have their time renewed; then the entries to append to each row. Gives the bytes
-- of `co_visits.append`.
local row_max, idle_ms, renewed = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local half, count_max, at_once = math.floor(row_max / 2), 4294967295, 50
local header, full_length = string.rep('\0', 16), 16 + 16 * row_max
-- The least count that stays, and how many of the first keys that have it go.
local function limits(keys, milli)
  local times, counts, above = {}, {}, 0
  for _, key in ipairs(keys) do
    local count = milli[key]
    if not times[count] then
      counts[#counts + 1], times[count] = count, 0
    end
    times[count] = times[count] + 1
  end
  table.sort(counts)
  for i = #counts, 1, -1 do
    above = above + times[counts[i]]
    if above >= half then
      return counts[i], above - half
    end
  end
end
local function compact(row)
  local milli_sum, next_sum = struct.unpack('<dd', row)
  local keys, milli, nexts, different = {}, {}, {}, 0
  for at = 17, #row, 16 * at_once do
    local n = math.min(at_once, (#row - at + 1) / 16)
    local values = {struct.unpack('<' .. string.rep('c8I4I4', n), row, at)}
    for i = 1, 3 * n, 3 do
      local key, m, c = values[i], values[i + 1], values[i + 2]
      milli_sum, next_sum = milli_sum + m, next_sum + c
      local before = milli[key]
      if before then
        milli[key], nexts[key] = before + m, nexts[key] + c
      else
        different = different + 1
        keys[different], milli[key], nexts[key] = key, m, c
      end
    end
  end
  local least, skipped = 0, 0
  if different > half then
    least, skipped = limits(keys, milli)
  end
  local parts, values, n = {''}, {}, 0
  local function pack()
    if n > 0 then
      parts[#parts + 1] = struct.pack('<' .. string.rep('c8I4I4', n / 3), unpack(values, 1, n))
      n = 0
    end
  end
  for _, key in ipairs(keys) do
    local m = milli[key]
    if m == least and skipped > 0 then
      skipped = skipped - 1
    elseif m >= least then
      local c = math.min(nexts[key], count_max)
      m = math.min(m, count_max)
      milli_sum, next_sum = milli_sum - m, next_sum - c
      values[n + 1], values[n + 2], values[n + 3] = key, m, c
      n = n + 3
      if n == 3 * at_once then
        pack()
      end
    end
  end
  pack()
  parts[1] = struct.pack('<dd', milli_sum, next_sum)
  return table.concat(parts)
end
-- One call a row in most cases. A row that cannot be appended to is rare, so the rows before it are
-- taken back then.
local new, full = {}, {}
for i = 2, #KEYS do
  local more = ARGV[i + 4]
  local length = redis.pcall('APPEND', KEYS[i], more)
  local appended = type(length) == 'number'
  if not appended or length % 16 ~= 0 then
    for j = 2, appended and i or i - 1 do
      local row = redis.call('GET', KEYS[j])
      row = string.sub(row, 1, #row - #ARGV[j + 4])
      if row == '' then
        redis.call('DEL', KEYS[j])
      else
        redis.call('SET', KEYS[j], row, 'KEEPTTL')
      end
    end
    return appended and redis.error_reply('ERR a damaged row in ' .. KEYS[i]) or length
  elseif length == #more then
    new[#new + 1] = i
  elseif length >= full_length then
    full[#full + 1] = i
  end
end
for _, i in ipairs(full) do
  redis.call('SET', KEYS[i], compact(redis.call('GET', KEYS[i])), 'KEEPTTL')
end
for _, i in ipairs(new) do
  local row = header .. ARGV[i + 4]
  if #row >= full_length then
    row = compact(row)
  end
  if idle_ms > 0 then
    redis.call('SET', KEYS[i], row, 'PX', ARGV[4])
  else
    redis.call('SET', KEYS[i], row)
  end
end
if idle_ms > 0 then
  for i = 2, 1 + renewed do
    redis.call('PEXPIRE', KEYS[i], ARGV[4])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
