"""What the store does in one step, as Lua. Each script's keys are of one bucket, but for those of ``release``,
``renew`` and ``enroll`` on a server that is no cluster.

Those that give something up, renew it or tell of a revocation run also when the server is out of memory
(``allow-oom``). Reads come before writes: where a slot of a cluster is just being moved, a read of a key that has gone
already ends the script before it has changed anything.

``engine`` is ``<run> <since> <rest> <longest> <till>``: the server's run that has answered for the bucket since a time,
for how long it recovers from then, and the longest lease that may be held until a time. Workers may be configured with
different leases. Recovering must outlast each that may have been granted by the run before, so it takes the longest
that was known then, where that survived, and is drawn out by a longer one that turns up before it ends; ``rest`` is 0
once it has. A worker whose
lease is longer than that of all the others must turn up while they recover: it does, since its connection is lost with
the server. All times are milliseconds of the server's clock.
"""

from dataclasses import dataclass, field
from hashlib import sha1
from typing import Final

_ENGINE: Final = """
local function write(key, engine)
  redis.call('SET', key, string.format('%s %.0f %.0f %.0f %.0f', unpack(engine)))
end

-- How many ms the bucket still recovers; 0 for a bucket that serves.
local function recovering(key, run, lease)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local old, since, rest, longest, till =
    string.match(redis.call('GET', key) or '', '^(%S+) (%d+) (%d+) (%d+) (%d+)$')
  since, rest, longest, till = tonumber(since), tonumber(rest), tonumber(longest), tonumber(till)
  local known = old and now < till and longest > lease and longest or lease
  if old ~= run then
    write(key, {run, now, known, known, now + known})
    return known
  end
  local changed = known ~= longest or (lease == longest and till - now < lease / 2)
  if since > now then since, changed = now, true end  -- the clock was set back
  local left = since + rest - now
  if left > 0 and lease > rest then rest, left, changed = lease, left + lease - rest, true end
  if left <= 0 and rest > 0 then rest, changed = 0, true end
  if changed then write(key, {run, since, rest, known, lease == known and now + lease or till}) end
  return math.max(left, 0)
end
"""

_LIVE: Final = """
-- Whether each tenancy that is named stands, asked once.
local function standing(prefix)
  local known = {}
  return function(tenancy)
    if known[tenancy] == nil then known[tenancy] = redis.call('EXISTS', prefix .. tenancy) == 1 end
    return known[tenancy]
  end
end

-- Both only lengthen a life.
local function keep(key, life)
  if redis.call('PTTL', key) < life then redis.call('PEXPIRE', key, life) end
end
"""

_ACQUIRE: Final = """
local engine, run, lease = redis.call('GET', KEYS[1]) or '', ARGV[1], tonumber(ARGV[2])
-- Most often it has served for long, and known such leases: then there is nothing to work out.
local longest = string.sub(engine, 1, #run) == run and string.match(engine, '^ %d+ 0 (%d+) ', #run + 1)
if not longest or tonumber(longest) < lease then
  local left = recovering(KEYS[1], run, lease)
  if left > 0 then return {'recovering', left} end
end
local tenancy, number, field, kind = ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local fence = redis.call('HGET', KEYS[2], 'fence')
local begins = not fence
if begins then
  if ARGV[9] ~= '1' then return {'gone'} end
  fence = redis.call('GET', KEYS[4]) or 0
end
if number <= tonumber(fence) then return {'late'} end

local stands = standing(string.sub(KEYS[2], 1, #KEYS[2] - #tenancy))
local all = redis.call('HGETALL', KEYS[3])
local place, dead, total, connections, held = {}, {}, 0, 0, false
for i = 1, #all, 2 do
  local of = string.match(all[i], '^l:(.*)%.%d+$')
  if not of then place[all[i]] = all[i + 1]
  elseif of == tenancy and begins or of ~= tenancy and not stands(of) then dead[#dead + 1] = all[i]
  elseif all[i] == field then held = true
  else
    total = total + 1
    if all[i + 1] == 'c' then connections = connections + 1 end
  end
end
if begins then
  redis.call('HSET', KEYS[2], 'fence', fence, 'run', ARGV[1])
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
for _, gone in ipairs(dead) do redis.call('HDEL', KEYS[3], gone) end
if not held then
  if total >= tonumber(ARGV[7]) then return {'refused', 'user'} end
  if kind == 'c' and connections >= tonumber(ARGV[8]) then return {'refused', 'connections'} end
end
redis.call('HSET', KEYS[3], field, kind)
if #all == 0 then redis.call('PEXPIRE', KEYS[3], ARGV[10]) else keep(KEYS[3], tonumber(ARGV[10])) end
if not place.pos and not place.seq then return 1 end
return {'granted', place.pos or '', place.epoch or '', place.seq or ''}
"""

_RELEASE: Final = """
for i = 0, #KEYS / 3 - 1 do
  local user, tenancy, before = KEYS[i * 3 + 1], KEYS[i * 3 + 2], KEYS[i * 3 + 3]
  local field, fence = ARGV[i * 2 + 2], ARGV[i * 2 + 3]
  redis.call('HDEL', user, field)
  if fence ~= '' then
    local old = redis.call('HGET', tenancy, 'fence')
    -- A tenancy that has not begun, or is gone, must not come to be by this.
    if not old then
      if tonumber(fence) > tonumber(redis.call('GET', before) or 0) then
        redis.call('SET', before, fence, 'PX', ARGV[1])
      end
    elseif tonumber(fence) > tonumber(old) then redis.call('HSET', tenancy, 'fence', fence) end
  end
end
return 'OK'
"""

_RENEW: Final = """
-- For each: lease, how many keys of users to touch, how many notices it was told of, and those in pairs.
local answers, key, arg = {}, 1, 3
while key <= #KEYS do
  local engine, tenancy = KEYS[key], KEYS[key + 1]
  local lease, touch, told = ARGV[arg], tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2])
  local left = recovering(engine, ARGV[1], tonumber(lease))
  -- What was put back in this run needs it no more.
  if left > 0 and redis.call('HGET', tenancy, 'run') ~= ARGV[1] then answers[#answers + 1] = {'recovering', left}
  elseif redis.call('PEXPIRE', tenancy, lease) == 0 then answers[#answers + 1] = {'gone'}
  else
    for i = 1, told do
      local name, position = 'n:' .. ARGV[arg + 1 + i * 2], ARGV[arg + 2 + i * 2]
      if redis.call('HGET', tenancy, name) == position then redis.call('HDEL', tenancy, name) end
    end
    for i = 1, touch do keep(KEYS[key + 1 + i], tonumber(ARGV[2])) end
    local answer, all = {'alive'}, redis.call('HGETALL', tenancy)
    for i = 1, #all, 2 do
      if string.sub(all[i], 1, 2) == 'n:' then
        answer[#answer + 1] = string.sub(all[i], 3)
        answer[#answer + 1] = all[i + 1]
      end
    end
    answers[#answers + 1] = answer
  end
  key, arg = key + 2 + touch, arg + 3 + told * 2
end
return answers
"""

_RESTORE: Final = """
if recovering(KEYS[1], ARGV[1], tonumber(ARGV[2])) <= 0 then return 0 end
local noticed = {}
for i = 3, #KEYS do noticed[i] = redis.call('HGET', KEYS[i], 'pos') end
redis.call('HSETNX', KEYS[2], 'fence', 0)
redis.call('HSET', KEYS[2], 'run', ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
for i = 3, #KEYS do
  -- It may have been left before this worker came back.
  if noticed[i] then redis.call('HSET', KEYS[2], 'n:' .. string.match(KEYS[i], '[^:]+$'), noticed[i]) end
  redis.call('HSET', KEYS[i], ARGV[i * 2 - 2], ARGV[i * 2 - 1])
  keep(KEYS[i], tonumber(ARGV[3]))
end
return 1
"""

_PUBLISH: Final = """
local run, payload, channel = ARGV[1], ARGV[3], ARGV[4]
local most, size, life = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local stands = standing(ARGV[9])
local all, place, connections = redis.call('HGETALL', KEYS[1]), {}, 0
for i = 1, #all, 2 do
  local of = string.match(all[i], '^l:(.*)%.%d+$')
  if not of then place[all[i]] = all[i + 1]
  elseif all[i + 1] == 'c' and stands(of) then connections = connections + 1 end
end
-- A run that is new may have lost events, whose sequences must not be given again under the same epoch.
if not place.epoch or string.sub(place.epoch, 1, 8) ~= string.sub(run, 1, 8) then
  place.epoch = string.sub(run, 1, 8) .. ARGV[2]
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', place.epoch, 'seq', 0)
end
local kept = redis.call('EXISTS', KEYS[2]) == 1 and tonumber(place.size or 0) or 0
local sequence = redis.call('HINCRBY', KEYS[1], 'seq', 1)
if most > 0 and #payload <= size then
  redis.call('XADD', KEYS[2], string.format('%.0f-0', sequence), 'p', payload)
  kept = kept + #payload
  while kept > size or redis.call('XLEN', KEYS[2]) > most do
    local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
    redis.call('XDEL', KEYS[2], oldest[1])
    kept = kept - #oldest[2][2]
  end
  redis.call('PEXPIRE', KEYS[2], life)
  redis.call('HSET', KEYS[1], 'size', string.format('%.0f', kept))
end
keep(KEYS[1], math.max(life, tonumber(ARGV[8])))
local workers = redis.call('SPUBLISH', channel, place.epoch .. ' ' .. string.format('%.0f', sequence) .. ' ' .. payload)
return {place.epoch, sequence, workers, connections}
"""

_HISTORY: Final = """
local place = redis.call('HMGET', KEYS[1], 'epoch', 'seq')
if not place[1] then return {} end
return {place[1], place[2], redis.call('XRANGE', KEYS[2], '(' .. ARGV[1] .. '-0', '+')}
"""

_NOTIFY: Final = """
local notice, forget, channel, prefix, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local time = redis.call('TIME')
local now, number = time[1] * 1000 + math.floor(time[2] / 1000), 0
local stands = standing(prefix)
local all, tenancies, leases, last = redis.call('HGETALL', KEYS[1]), {}, 0, {}
for i = 1, #all, 2 do
  local of = string.match(all[i], '^l:(.*)%.%d+$')
  if all[i] == 'pos' then last[1] = all[i + 1]
  elseif of and stands(of) then
    leases = leases + 1
    if not tenancies[of] then
      tenancies[of] = true
      tenancies[#tenancies + 1] = of
    end
  end
end
-- Later than every position that was given out, also when the server's clock was set back.
local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if newest then last[#last + 1] = newest[1] end
for _, position in ipairs(last) do
  local ms, n = string.match(position, '^(%d+)-(%d+)$')
  ms, n = tonumber(ms), tonumber(n)
  if ms > now or (ms == now and n >= number) then now, number = ms, n + 1 end
end
local position = string.format('%.0f-%.0f', now, number)
-- Whoever clears a lot must not push out a revocation that a worker has still to see: the newest stays in any case.
redis.call('XADD', KEYS[2], position, forget == '1' and 'r' or 'p', notice)
local over = redis.call('XLEN', KEYS[2]) - tonumber(ARGV[7])
if over > 0 then
  local entries, revoked = redis.call('XRANGE', KEYS[2], '-', '+'), nil
  for _, entry in ipairs(entries) do if entry[2][1] == 'r' then revoked = entry[1] end end
  for _, entry in ipairs(entries) do
    if over > 0 and entry[1] ~= revoked then
      redis.call('XDEL', KEYS[2], entry[1])
      over = over - 1
    end
  end
end
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('HSET', KEYS[1], 'pos', position)
keep(KEYS[1], tonumber(ARGV[6]))
if forget == '1' then
  redis.call('DEL', KEYS[3])
  redis.call('HDEL', KEYS[1], 'epoch', 'seq', 'size')
end
for _, tenancy in ipairs(tenancies) do redis.call('HSET', prefix .. tenancy, 'n:' .. digest, position) end
if leases > 0 then redis.call('SPUBLISH', channel, table.concat(tenancies, ' ')) end
return {position, leases}
"""

_LEASES: Final = """
local stands = standing(ARGV[1])
local all, live = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  local of = string.match(all[i], '^l:(.*)%.%d+$')
  if of and stands(of) then
    live[#live + 1] = all[i]
    live[#live + 1] = all[i + 1]
  end
end
return live
"""

_ENROLL: Final = """
local most = 0
for _, key in ipairs(KEYS) do most = math.max(most, recovering(key, ARGV[1], tonumber(ARGV[2]))) end
return most
"""

_ROOM: Final = "return 1"
"""Refused by a server that is out of memory, as an acquire is."""

_SEAL: Final = """
-- ARGV[1] is how long it stands; then the application's seals, newest first.
local found = redis.call('GET', KEYS[1])
if not found then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
  return 0
end
for i = 2, #ARGV do
  if ARGV[i] == found then
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
    return i - 2
  end
end
return -1
"""

_PROBE: Final = """
-- Which commands are forbidden or missing: each is tried on a key that is for nothing else.
local key, channel, refused = KEYS[1], ARGV[1], {}
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    local text = answer.err
    local about = (string.find(text, 'access a key') or string.find(text, 'of the keys')) and 'key'
      or (string.find(text, 'access a channel') or string.find(text, 'to the channel')) and 'channel' or 'command'
    refused[#refused + 1] = string.lower((...)) .. ' ' .. about
  end
end
try('TIME')
try('SET', key, '1', 'PX', 1000)
try('GET', key)
try('EXISTS', key)
try('PTTL', key)
try('PEXPIRE', key, 1000)
try('DEL', key)
try('HSET', key, 'f', '1')
try('HSETNX', key, 'f', '1')
try('HGET', key, 'f')
try('HMGET', key, 'f')
try('HGETALL', key)
try('HINCRBY', key, 'f', 1)
try('HDEL', key, 'f')
redis.pcall('DEL', key)
try('XADD', key, '1-0', 'p', '1')
try('XLEN', key)
try('XRANGE', key, '-', '+')
try('XREVRANGE', key, '+', '-')
try('XDEL', key, '1-0')
redis.pcall('DEL', key)
try('SPUBLISH', channel, '')
return refused
"""


@dataclass(frozen=True, slots=True)
class Script:
    """One of them; ``sha`` is what a server knows it by."""

    name: str
    text: str = field(repr=False)
    sha: str


def _script(name: str, body: str, flags: str = "") -> Script:
    text = f"#!lua{f' flags={flags}' if flags else ''}\n{body}"
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())


ACQUIRE: Final = _script("acquire", _ENGINE + _LIVE + _ACQUIRE)
RELEASE: Final = _script("release", _RELEASE, "allow-oom")
RENEW: Final = _script("renew", _ENGINE + _LIVE + _RENEW, "allow-oom")
RESTORE: Final = _script("restore", _ENGINE + _LIVE + _RESTORE, "allow-oom")
PUBLISH: Final = _script("publish", _LIVE + _PUBLISH)
HISTORY: Final = _script("history", _HISTORY, "no-writes")
NOTIFY: Final = _script("notify", _LIVE + _NOTIFY, "allow-oom")
LEASES: Final = _script("leases", _LIVE + _LEASES, "no-writes")
ENROLL: Final = _script("enroll", _ENGINE + _ENROLL, "allow-oom")
ROOM: Final = _script("room", _ROOM)
SEAL: Final = _script("seal", _SEAL, "allow-oom")
PROBE: Final = _script("probe", _PROBE, "allow-oom")
