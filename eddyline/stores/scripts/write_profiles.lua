-- ARGV[3]: n profiles, ARGV[4]: g keys of a forgotten user; KEYS[2] …: n profile keys, then g keys for each
-- forgotten one: profile, recent list, older list, embeddings. ARGV[5] …: n profile values, then for each
-- forgotten one the time (broker's clock, ms) up to which he is, or nothing for whatever there is.
local n, g = tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 1, n do
  redis.call('SET', KEYS[1 + i], ARGV[4 + i])
end
local at = 1 + n
for i = 5 + n, #ARGV do
  redis.call('DEL', KEYS[at + 1])
  local recent = ARGV[i] ~= '' and redis.call('GET', KEYS[at + 2])
  local read, list = pcall(cmsgpack.unpack, recent and string.sub(recent, 1, -9) or '')
  local appended_ms = read and type(list) == 'table' and tonumber(list[6])
  -- A list that has gone on since stays: `clicks` says at which place in it he was forgotten. One that cannot
  -- be read goes: an error here would leave the fence moved and him remembered.
  if not appended_ms or appended_ms <= tonumber(ARGV[i]) then
    for k = 2, g do
      redis.call('DEL', KEYS[at + k])
    end
  end
  at = at + g
end
return {1, ''}
