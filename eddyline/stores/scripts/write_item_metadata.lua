-- KEYS[2]: the set of items that have a refused record, KEYS[3] …: keys of item metadata. ARGV[3]:
-- how many bytes of such a key precede the item's id; then pairs (source offset, value). A lower
-- offset never overrides a stored one. Byte 13 of a value, less 1, has the flag 2 if it has a
-- refused record, see `item_codec`.
local some = redis.call('SCARD', KEYS[2]) > 0 -- fails for a key of another type
local newer = {}
for i = 3, #KEYS do
  local head, offset = redis.call('GETRANGE', KEYS[i], 4, 11), tonumber(ARGV[2 * i - 2])
  if #head < 8 or struct.unpack('<i8', head) <= offset then
    newer[#newer + 1] = i
  end
end
for _, i in ipairs(newer) do
  local value, item = ARGV[2 * i - 1], string.sub(KEYS[i], ARGV[3] + 1)
  redis.call('SET', KEYS[i], value)
  if (string.byte(value, 13) - 1) % 4 >= 2 then
    redis.call('SADD', KEYS[2], item)
    some = true
  elseif some then
    redis.call('SREM', KEYS[2], item)
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
