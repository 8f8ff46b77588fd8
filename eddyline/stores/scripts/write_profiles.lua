-- ARGV[3]: n profiles, ARGV[4]: g keys of a forgotten user. KEYS[2] …: n profile keys, their n
-- erasure keys, then g keys for each forgotten user: profile, recent history, older history,
-- seen items, embeddings. ARGV[5] …: n profiles, then for each forgotten user the time of the null
-- record (broker's clock, ms), or "" to delete in any case.
local n, g = tonumber(ARGV[3]), tonumber(ARGV[4])
local skipped, gone, at = {}, {}, 1 + 2 * n
for i = 1, n do
  -- Not set are a profile that is older than the user's null record (`Erasure.covers_profile`), and
  -- a replayed one that is older than the stored profile (`erasure.is_outdated`).
  local offset, first_ms = struct.unpack('<i8i8', ARGV[4 + i])
  local erasure = redis.call('GET', KEYS[1 + n + i])
  if erasure and #erasure == 24 then
    local until_ms, users_offset = struct.unpack('<i8i8', erasure)
    if offset < 0 then
      until_ms = until_ms - 1
    end
    skipped[i] = offset < users_offset and first_ms <= until_ms
  end
  local stored = offset < 0 and redis.call('GET', KEYS[1 + i])
  if stored and #stored >= 16 then
    local _, stored_ms = struct.unpack('<i8i8', stored)
    skipped[i] = skipped[i] or first_ms < stored_ms
  end
end
for i = 5 + n, #ARGV do
  gone[#gone + 1] = KEYS[at + 1]
  local recent = ARGV[i] ~= '' and redis.call('GET', KEYS[at + 2])
  local read, list = pcall(cmsgpack.unpack, recent and string.sub(recent, 1, -9) or '')
  local appended_ms = read and type(list) == 'table' and tonumber(list[6])
  -- A history with a later event stays: a Forget in `clicks` removes its older events. A history
  -- that cannot be decoded is deleted.
  if not appended_ms or appended_ms <= tonumber(ARGV[i]) then
    for k = 2, g do
      gone[#gone + 1] = KEYS[at + k]
    end
  end
  at = at + g
end
for i = 1, n do
  if not skipped[i] then
    redis.call('SET', KEYS[1 + i], ARGV[4 + i])
  end
end
for _, key in ipairs(gone) do
  redis.call('DEL', key)
end
redis.call('SET', KEYS[1], ARGV[2])
return {1, ''}
