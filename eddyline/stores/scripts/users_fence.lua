-- Head of write_users.lua. KEYS[2]: the fence of `users`, ARGV[3]: its expected value ("-": not
-- checked). If it differs, a user may have been forgotten since, and this write would restore the
-- user's history.
if ARGV[3] ~= '-' then
  local found = redis.call('GET', KEYS[2]) or ''
  if found ~= ARGV[3] then
    return {0, found}
  end
end
