-- Runs after the heads users_fence.lua and fence.lua. KEYS[3]: the event-id window, KEYS[4]: the
-- outbox of co-visits; then the keys to write: m recent histories, older histories, embeddings,
-- their generations; then f keys of erasures; then the keys to delete, none of which is written.
-- ARGV[4]: floor of the window, ARGV[5]: blob of accepted ids or "", ARGV[6]: floor of the outbox,
-- ARGV[7]: blob of visits or "", ARGV[8]: m, ARGV[9]: keys to write, ARGV[10]: f, ARGV[11]: how
-- long an erasure stays after its end, ms; then the values to write, then f pairs (erasure, its end
-- in ms).
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local m, n, f = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
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
for first = 1, n, 1000 do -- unpack takes a few thousand values at most
  local pairs_, last = {}, math.min(first + 999, n)
  for i = first, last do
    pairs_[#pairs_ + 1] = KEYS[4 + i]
    pairs_[#pairs_ + 1] = i <= m and ARGV[11 + i] .. stamp or ARGV[11 + i]
  end
  redis.call('MSET', unpack(pairs_))
end
for i = 5 + n + f, #KEYS do
  redis.call('DEL', KEYS[i])
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
  local ends_ms = math.max(tonumber(ARGV[11 + n + 2 * i]), us / 1000) + tonumber(ARGV[11])
  redis.call('SET', KEYS[4 + n + i], ARGV[10 + n + 2 * i], 'PXAT', string.format('%.0f', ends_ms))
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, string.format('%.0f', us)}
