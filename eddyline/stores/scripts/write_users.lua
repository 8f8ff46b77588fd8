-- Runs after the heads users_fence.lua and fence.lua. KEYS[3]: the event-id window, KEYS[4]: the
-- outbox of co-visits; then n keys to write: m recent histories, older histories, embeddings, seen
-- items of users who begin anew, their generations; then f keys of erasures; then s keys of seen
-- items to append to; then the keys to delete, none of which is written.
-- ARGV[4]: floor of the window, ARGV[5]: blob of accepted ids or "", ARGV[6]: floor of the outbox,
-- ARGV[7]: blob of visits or "", ARGV[8]: m, ARGV[9]: n, ARGV[10]: f, ARGV[11]: how long an erasure
-- stays after its end, ms, ARGV[12]: s, ARGV[13]: see `seen_max` of `UserEffects`; then n values to
-- write, f pairs (erasure, its end in ms), s values to append.
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local m, n, f = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local s, seen_max = tonumber(ARGV[12]), tonumber(ARGV[13])
-- Gives the bytes of `seen_items.append`.
local function compact_seen(value)
  local names, latest = {}, {}
  for at = 1, #value, 600 do
    local count = math.min(50, (#value - at + 1) / 12)
    local parts = {struct.unpack('<' .. string.rep('c8I4', count), value, at)}
    for i = 1, 2 * count, 2 do
      local name, minute_kind = parts[i] .. string.char(parts[i + 1] % 8), parts[i + 1]
      if not latest[name] then
        names[#names + 1], latest[name] = name, minute_kind
      elseif latest[name] < minute_kind then
        latest[name] = minute_kind
      end
    end
  end
  local least, equal, skipped = 0, {}, {}
  if #names > seen_max then
    local sorted, above = {}, 0
    for i, name in ipairs(names) do
      sorted[i] = latest[name]
    end
    table.sort(sorted)
    least = sorted[#sorted - seen_max + 1]
    for _, name in ipairs(names) do
      if latest[name] > least then
        above = above + 1
      elseif latest[name] == least then
        local low, high = struct.unpack('<I4I4', name)
        equal[#equal + 1] = {high, low, name}
      end
    end
    table.sort(equal, function(a, b)
      if a[1] ~= b[1] then
        return a[1] < b[1]
      end
      return a[2] < b[2]
    end)
    for i = 1, above + #equal - seen_max do
      skipped[equal[i][3]] = true
    end
  end
  local kept = {}
  for _, name in ipairs(names) do
    if latest[name] >= least and not skipped[name] then
      kept[#kept + 1] = string.sub(name, 1, 8) .. struct.pack('<I4', latest[name])
    end
  end
  return table.concat(kept)
end
local old = {}
for i = 3, 4 do
  old[i] = 0
  if ARGV[2 * i - 1] ~= '' then
    local floor = tonumber(ARGV[2 * i - 2])
    while old[i] < 16 do -- each write adds one blob: removing a few keeps up
      local blob = redis.call('LINDEX', KEYS[i], old[i])
      if blob and #blob < 8 then
        return redis.error_reply('ERR a damaged entry in ' .. KEYS[i])
      end
      if not blob or struct.unpack('<i8', string.sub(blob, 1, 8)) >= floor then
        break
      end
      old[i] = old[i] + 1
    end
  end
end
local compacted = {}
for i = 1, s do
  local key, more = KEYS[4 + n + f + i], ARGV[13 + n + 2 * f + i]
  local length = redis.call('STRLEN', key) -- fails for another type
  if length % 12 ~= 0 then
    return redis.error_reply('ERR damaged seen items in ' .. key)
  end
  if length + #more >= 24 * seen_max then
    compacted[i] = compact_seen((redis.call('GET', key) or '') .. more)
  end
end
for first = 1, n, 1000 do -- unpack takes a few thousand values at most
  local pairs_, last = {}, math.min(first + 999, n)
  for i = first, last do
    pairs_[#pairs_ + 1] = KEYS[4 + i]
    pairs_[#pairs_ + 1] = i <= m and ARGV[13 + i] .. stamp or ARGV[13 + i]
  end
  redis.call('MSET', unpack(pairs_))
end
for i = 5 + n + f + s, #KEYS do
  redis.call('DEL', KEYS[i])
end
for i = 1, s do
  if compacted[i] then
    redis.call('SET', KEYS[4 + n + f + i], compacted[i])
  else
    redis.call('APPEND', KEYS[4 + n + f + i], ARGV[13 + n + 2 * f + i])
  end
end
for i = 3, 4 do
  if ARGV[2 * i - 1] ~= '' then
    redis.call('RPUSH', KEYS[i], ARGV[2 * i - 1])
    for _ = 1, old[i] do
      redis.call('LPOP', KEYS[i])
    end
  end
end
-- After the deletions: where an erasure is stored, a repeated Forget has no effect.
for i = 1, f do
  -- A log may be read long after its records were appended: an erasure that has ended stays too.
  local ends_ms = math.max(tonumber(ARGV[13 + n + 2 * i]), us / 1000) + tonumber(ARGV[11])
  redis.call('SET', KEYS[4 + n + i], ARGV[12 + n + 2 * i], 'PXAT', string.format('%.0f', ends_ms))
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, string.format('%.0f', us)}
