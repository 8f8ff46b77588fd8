-- Put before fence.lua where KEYS[2] is the fence of `users` and ARGV[3] what it must be ("-": anything): who
-- wrote there since may have forgotten a user whose list this write would bring back.
if ARGV[3] ~= '-' then
  local theirs = redis.call('GET', KEYS[2]) or ''
  if theirs ~= ARGV[3] then
    return {0, theirs}
  end
end
