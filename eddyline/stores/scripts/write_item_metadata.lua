-- KEYS[2] …: keys of item metadata. ARGV[3] …: pairs (source offset, value). A lower offset never
-- overrides a stored one.
for i = 2, #KEYS do
  local head = redis.call('GETRANGE', KEYS[i], 4, 11)
  local offset, value = tonumber(ARGV[2 * i - 1]), ARGV[2 * i]
  if #head < 8 or struct.unpack('<i8', head) <= offset then
    redis.call('SET', KEYS[i], value)
  end
end
return {1, ''}
