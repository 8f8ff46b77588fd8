-- Runs after the heads users_fence.lua and fence.lua. KEYS[3]: the event-id window; then the keys
-- to write: m recent histories, older histories, embeddings; then the keys to delete first.
-- ARGV[4]: floor of the window, ARGV[5]: blob of accepted ids or "", ARGV[6]: m,
-- ARGV[7]: 1 + keys to write; then their values.
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local stamp = struct.pack('<i8', us)
local m, n = tonumber(ARGV[6]), tonumber(ARGV[7]) - 1
if ARGV[5] ~= '' then
  redis.call('RPUSH', KEYS[3], ARGV[5])
  local floor = tonumber(ARGV[4])
  for _ = 1, 16 do -- each write adds one blob: removing a few keeps up
    local oldest = redis.call('LINDEX', KEYS[3], 0)
    -- The list may become empty: offsets have gaps, so even the new blob may end below the floor.
    if not oldest or struct.unpack('<i8', string.sub(oldest, 1, 8)) >= floor then
      break
    end
    redis.call('LPOP', KEYS[3])
  end
end
for i = 4 + n, #KEYS do
  redis.call('DEL', KEYS[i])
end
for first = 1, n, 1000 do -- unpack takes a few thousand values at most
  local pairs_, last = {}, math.min(first + 999, n)
  for i = first, last do
    pairs_[#pairs_ + 1] = KEYS[3 + i]
    pairs_[#pairs_ + 1] = i <= m and ARGV[7 + i] .. stamp or ARGV[7 + i]
  end
  redis.call('MSET', unpack(pairs_))
end
return {1, string.format('%.0f', us)}
