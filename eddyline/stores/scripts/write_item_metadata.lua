-- KEYS[2] …: keys of item metadata. ARGV[3] …: pairs (source offset, value). A lower offset never
-- overrides a stored one.
local newer = {}
for i = 2, #KEYS do
  local head, offset = redis.call('GETRANGE', KEYS[i], 4, 11), tonumber(ARGV[2 * i - 1])
  if #head < 8 or struct.unpack('<i8', head) <= offset then
    newer[#newer + 1] = i
  end
end
for _, i in ipairs(newer) do
  redis.call('SET', KEYS[i], ARGV[2 * i])
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
