-- KEYS[1] …: the fences of the n partitions of `items`, then keys of item metadata. ARGV[1]: n,
-- ARGV[2]: slack, ms, ARGV[3]: how many ms a deleted item is kept that does not say so, ARGV[4]:
-- key prefix of the slot. Removes their co-visitation rows too. Returns how many items were
-- removed. The values are those of `item_codec`.
local n, slack = tonumber(ARGV[1]), tonumber(ARGV[2])
-- A producer may have dated the last record.
local time = redis.call('TIME')
local bounds, lowest = {}, time[1] * 1000
for i = 1, n do
  local place = redis.call('GET', KEYS[i]) or ''
  local now = tonumber(string.match(place, '|%-?%d+,(%d+),%d+$')) or 0
  bounds[i - 1] = math.min(now, time[1] * 1000) - slack
  lowest = math.min(lowest, bounds[i - 1])
end
local removed = 0
for i = n + 1, #KEYS do
  local value, ends = redis.call('GETRANGE', KEYS[i], 0, 29), 0
  local mark = #value > 12 and string.byte(value, 13) - 1 or -1
  if #value == 12 then
    ends = tonumber(ARGV[3])
  elseif #value == 21 and mark >= 0 and mark <= 1 then
    ends = struct.unpack('<i8', string.sub(value, 14)) + tonumber(ARGV[3])
  elseif #value == 29 and mark >= 4 and mark <= 5 then
    ends = struct.unpack('<i8', string.sub(value, 22))
  end
  if ends > 0 and ends < (bounds[struct.unpack('<i4', value)] or lowest) then
    local item = string.sub(KEYS[i], #ARGV[4] + 3)
    -- KEYS does not name the rows: while a cluster moves the slot they may be on the other node;
    -- the next call removes the item then.
    local rows = redis.pcall('UNLINK', ARGV[4] .. 'after:' .. item, ARGV[4] .. 'before:' .. item)
    if type(rows) == 'number' then
      redis.call('UNLINK', KEYS[i])
      removed = removed + 1
    end
  end
end
return removed
