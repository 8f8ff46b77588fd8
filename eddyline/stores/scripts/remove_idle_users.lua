-- KEYS[1]: the fence of `clicks`, KEYS[2]: the slot's generations, KEYS[3] …: recent histories.
-- ARGV[1]: key prefix of the slot, ARGV[2]: slack, ms, ARGV[3]: after how many ms a user is idle
-- whose history does not say so. Returns how many users were removed.
local place = redis.call('GET', KEYS[1]) or ''
local now = tonumber(string.match(place, '|%-?%d+,(%d+),%d+$'))
if not now then
  return 0
end
-- A producer may have dated the last record.
local time = redis.call('TIME')
local bound = math.min(now, time[1] * 1000) - tonumber(ARGV[2])
local generations = {}
for key, value in pairs(cmsgpack.unpack(redis.call('GET', KEYS[2]) or '\128')) do
  generations[#generations + 1] = type(key) == 'number' and value or key
end
local removed = 0
for i = 3, #KEYS do
  local recent = redis.call('GET', KEYS[i]) or ''
  local read, list = pcall(cmsgpack.unpack, string.sub(recent, 1, -9))
  if read and type(list) == 'table' and tonumber(list[6]) then
    local idle_after = tonumber(list[10])
    if not idle_after then
      idle_after = list[6] > 0 and list[6] + tonumber(ARGV[3]) or 0
    end
    if idle_after > 0 and idle_after < bound then
      local user = string.sub(KEYS[i], #ARGV[1] + 3)
      local keys = {ARGV[1] .. 'o:' .. user, ARGV[1] .. 'seen:' .. user}
      for _, name in ipairs(generations) do
        keys[#keys + 1] = ARGV[1] .. 'e:' .. name .. ':' .. user
      end
      -- KEYS does not name them: while a cluster moves the slot they may be on the other node; the
      -- next call removes the user then.
      if type(redis.pcall('UNLINK', unpack(keys))) == 'number' then
        redis.call('UNLINK', KEYS[i])
        removed = removed + 1
      end
    end
  end
end
return removed
