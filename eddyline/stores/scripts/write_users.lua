-- KEYS[3]: the event-id window; then the keys to write: m recent lists, older lists, embeddings; then the keys
-- to delete first. ARGV[4]: the window's floor, ARGV[5]: the blob of accepted ids or nothing, ARGV[6]: m,
-- ARGV[7]: keys to write and the window; then the values.
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local m, n = tonumber(ARGV[6]), tonumber(ARGV[7]) - 1
if ARGV[5] ~= '' then
  redis.call('RPUSH', KEYS[3], ARGV[5])
  local floor = tonumber(ARGV[4])
  for _ = 1, 16 do -- each write adds one blob, so that a few at a time are enough
    local oldest = redis.call('LINDEX', KEYS[3], 0)
    -- None is left where even the new blob ends below the floor: offsets have gaps.
    if not oldest or struct.unpack('<i8', string.sub(oldest, 1, 8)) >= floor then
      break
    end
    redis.call('LPOP', KEYS[3])
  end
end
for i = 4 + n, #KEYS do
  redis.call('DEL', KEYS[i])
end
for first = 1, n, 1000 do -- unpack holds a few thousand values at most
  local pairs_, last = {}, math.min(first + 999, n)
  for i = first, last do
    pairs_[#pairs_ + 1] = KEYS[3 + i]
    pairs_[#pairs_ + 1] = i <= m and ARGV[7 + i] .. stamp or ARGV[7 + i]
  end
  redis.call('MSET', unpack(pairs_))
end
return {1, string.format('%.0f', us)}
