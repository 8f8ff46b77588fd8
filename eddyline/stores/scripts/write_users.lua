-- Runs after the heads users_fence.lua and fence.lua. KEYS[3]: the event-id window; then the keys
-- to write: m recent histories, older histories, embeddings, their generations; then f keys of
-- erasures; then the keys to delete, none of which is written. ARGV[4]: floor of the window,
-- ARGV[5]: blob of accepted ids or "", ARGV[6]: m, ARGV[7]: 1 + keys to write, ARGV[8]: f, ARGV[9]:
-- how long an erasure stays after its end, ms; then the values to write, then f pairs (erasure, its
-- end in ms).
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local m, n, f = tonumber(ARGV[6]), tonumber(ARGV[7]) - 1, tonumber(ARGV[8])
local old = 0
if ARGV[5] ~= '' then
  local floor = tonumber(ARGV[4])
  while old < 16 do -- each write adds one blob: removing a few keeps up
    local blob = redis.call('LINDEX', KEYS[3], old)
    if blob and #blob < 8 then
      return redis.error_reply('ERR a damaged entry in ' .. KEYS[3])
    end
    if not blob or struct.unpack('<i8', string.sub(blob, 1, 8)) >= floor then
      break
    end
    old = old + 1
  end
end
for first = 1, n, 1000 do -- unpack takes a few thousand values at most
  local pairs_, last = {}, math.min(first + 999, n)
  for i = first, last do
    pairs_[#pairs_ + 1] = KEYS[3 + i]
    pairs_[#pairs_ + 1] = i <= m and ARGV[9 + i] .. stamp or ARGV[9 + i]
  end
  redis.call('MSET', unpack(pairs_))
end
for i = 4 + n + f, #KEYS do
  redis.call('DEL', KEYS[i])
end
if ARGV[5] ~= '' then
  redis.call('RPUSH', KEYS[3], ARGV[5])
  for _ = 1, old do
    redis.call('LPOP', KEYS[3])
  end
end
-- After the deletions: where an erasure is stored, a repeated Forget has no effect.
for i = 1, f do
  -- A log may be read long after its records were appended: an erasure that has ended stays too.
  local ends_ms = math.max(tonumber(ARGV[9 + n + 2 * i]), us / 1000) + tonumber(ARGV[9])
  redis.call('SET', KEYS[3 + n + i], ARGV[8 + n + 2 * i], 'PXAT', string.format('%.0f', ends_ms))
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, string.format('%.0f', us)}
