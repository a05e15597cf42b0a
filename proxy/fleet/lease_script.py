"""What the directory does with one call for leases: the Lua of ``leases.py``, where the theory is.

The server is asked for nothing but what happened to one origin: its keys are a hash with the
origin's state and one row for each node that holds or wants a lease, and, for fleets of many more
nodes than leases, a line of those that have no row yet (``line`` by when they came, ``seen`` by
when they are forgotten). So a call costs what its few rows cost, however many nodes wait.

The prologue says what time it is and which server this is; tests put their own in its place.
"""

from __future__ import annotations

from proxy.fleet.script import Script

#: The names of an origin's keys, behind the root of its hash tag.
KEYS = ("leases", "line", "seen")

PROLOGUE = """
local time = redis.call('TIME')
local wall = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local server = ARGV[2]
"""

BODY = """
local ask = cjson.decode(ARGV[1])
local hash, line, seen = KEYS[1] .. ':leases', KEYS[1] .. ':line', KEYS[1] .. ':seen'
local node, max, min = ask.node, math.max, math.min

-- What is known ------------------------------------------------------------------------------

local have, rows, count = {}, {}, 0
local flat = redis.call('HGETALL', hash)
for i = 1, #flat, 2 do
  local name, text = flat[i], flat[i + 1]
  if string.sub(name, 1, 2) == 'n:' then
    local held, want, kept, stamp, ends, seq, cap =
      string.match(text, '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
    rows[string.sub(name, 3)] = {
      held = tonumber(held), want = tonumber(want), kept = tonumber(kept),
      stamp = tonumber(stamp), ends = tonumber(ends), seq = tonumber(seq), cap = tonumber(cap),
    }
    count = count + 1
  else
    have[name] = text
  end
end

-- Two clocks that never run faster than calls come: a server whose time is set forward, or that
-- was stopped, ends no lease early.
local passed = max(0, wall - tonumber(have.wall or wall))
local clock = tonumber(have.clock or 0) + min(passed, ask.tick)
local slow = tonumber(have.slow or 0) + min(passed, ask.slow_tick)

-- Another server, or this one without its memory: a new epoch. Nothing is granted until every
-- lease of the one before has ended; who holds some is entered again.
local calm = tonumber(have.calm or 0)
local settled = tonumber(have.settled or 0)
if have.server ~= server then
  redis.call('DEL', hash, line, seen)
  rows, count = {}, 0
  calm = clock + ask.lease + ask.lag
  settled = slow + ask.hold + ask.lag
  for name in pairs(have) do
    if string.sub(name, 1, 2) == 'r:' then have[name] = nil end
  end
end
local is_calm = clock < calm

for name, row in pairs(rows) do
  if row.ends <= clock then
    redis.call('HDEL', hash, 'n:' .. name)
    rows[name] = nil
    count = count - 1
  end
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', clock, 'LIMIT', 0, 100)) do
  redis.call('ZREM', seen, name)
  redis.call('ZREM', line, name)
end

local me = rows[node]
if me and ask.seq <= me.seq then
  return cjson.encode({stale = true})
end

-- The cap that the upstream has shown to stand -----------------------------------------------

local version, limit, ceiling, run = string.match(have.law or '', '^(%d+) (%d+) (%d+) (%d+)$')
version, limit = tonumber(version or 0), tonumber(limit or ask.law.limit)
ceiling, run = tonumber(ceiling or ask.law.ceiling), tonumber(run or 0)
local function changed() run, version = 0, max(version + 1, wall) end
if version == 0 then
  changed()
elseif ask.law.base == version then
  if ask.law.changed then
    limit, ceiling = ask.law.limit, ask.law.ceiling
    changed()
  elseif ask.law.went_well > 0 then
    run = run + ask.law.went_well
    if run >= ask.law.needed and limit < ask.cap then
      limit = limit + 1
      if ceiling > 0 and limit > ceiling then ceiling = 0 end
      changed()
    end
  end
elseif is_calm and ask.law.limit < limit then
  limit, ceiling = ask.law.limit, ask.law.ceiling
  changed()
end

-- Leases -------------------------------------------------------------------------------------

local least, others = ask.cap, 0
for name, row in pairs(rows) do
  least = min(least, row.cap)
  if name ~= node then others = others + row.held end
end
local reserve = ask.reserve
for name in pairs(have) do
  local number = string.match(name, '^r:(%d+)$')
  if number then reserve = max(reserve, tonumber(number)) end
end
local hard = max(0, least - reserve)
local most = min(max(1, limit), hard)

-- Who claims more than was granted gets no more than that; one that is not known has leases of
-- the epoch before, or none.
local held = ask.held
if me then
  held = min(held, me.held)
else
  held = is_calm and min(held, max(0, hard - others)) or 0
end
local want = min(ask.want, most)
local seats = 2 * hard + 64
local ahead = 0
if not me and (held > 0 or want > 0) then
  local rank = redis.call('ZRANK', line, node) or redis.call('ZCARD', line)
  if held > 0 or rank < seats - count then
    me = {kept = 0, stamp = clock}
    rows[node], count = me, count + 1
    redis.call('ZREM', line, node)
    redis.call('ZREM', seen, node)
  else
    redis.call('ZADD', line, 'NX', clock, node)
    redis.call('ZADD', seen, clock + ask.lease, node)
    ahead = rank + 1
  end
end

local grant, keep, share, rivals = 0, held, 0, 0
local queued = redis.call('ZCARD', line)
if me then
  local gave = me.held and held < me.held
  if gave then
    me.stamp, me.kept = clock, 0
  end
  me.held, me.want, me.seq, me.cap, me.ends = held, want, ask.seq, ask.cap, clock + ask.lease

  -- Fair shares: equal parts, of which nobody gets more than it wants; what cannot be divided
  -- goes to who holds it for a short time yet, then to who waits longest.
  local wanting, left = {}, most
  for name, row in pairs(rows) do
    row.share = 0
    if row.want > 0 then
      row.name = name
      wanting[#wanting + 1] = row
    end
  end
  table.sort(wanting, function(a, b)
    if a.want ~= b.want then return a.want < b.want end
    return a.name < b.name
  end)
  local first = 1
  while first <= #wanting and wanting[first].want * (#wanting - first + 1) <= left do
    wanting[first].share = wanting[first].want
    left = left - wanting[first].want
    first = first + 1
  end
  local unmet = {}
  if first <= #wanting then
    local part = math.floor(left / (#wanting - first + 1))
    for i = first, #wanting do
      local row = wanting[i]
      row.share = min(part, row.want)
      left = left - row.share
      if row.want > part then
        row.rank = 1
        if row.held > part then row.rank = (clock - row.stamp < ask.quantum) and 0 or 2 end
        unmet[#unmet + 1] = row
      end
    end
    table.sort(unmet, function(a, b)
      if a.rank ~= b.rank then return a.rank < b.rank end
      if a.stamp ~= b.stamp then return a.stamp < b.stamp end
      return a.name < b.name
    end)
    for i = 1, min(left, #unmet) do unmet[i].share = unmet[i].share + 1 end
  end
  share = me.share

  local free = most - others - held
  local kept = most >= ask.keeps_from and 1 or 0
  local room = ask.metadata > 0 and free or free - kept
  if not is_calm then
    grant = max(0, min(share - held, room))
    if grant == 0 and kept == 1 and ask.metadata > 0 and free > 0 and held < want then
      grant = 1
    end
  end
  if grant > 0 then me.stamp = clock end
  if kept == 0 or grant < free then me.kept = 0 elseif grant > 0 then me.kept = 1 end
  me.held = held + grant

  -- What the others lack, and what this one has to give of it.
  local lacking = 0
  for name, row in pairs(rows) do
    if name ~= node and row.want > row.held then
      rivals = rivals + 1
      lacking = lacking + max(0, row.share - row.held)
    end
  end
  keep = me.held
  if not is_calm then
    keep = max(share, me.held - max(0, lacking - (free - grant)))
    keep = min(keep, me.held)
    if me.kept == 1 and ask.metadata == 0 and count > 1 then keep = min(keep, me.held - 1) end
  end

  if ask.leaves or (me.held == 0 and (want == 0 or (queued > 0 and gave))) then
    redis.call('HDEL', hash, 'n:' .. node)
    rows[node], count = nil, count - 1
    if want > 0 and not ask.leaves then
      redis.call('ZADD', line, 'NX', clock, node)
      redis.call('ZADD', seen, clock + ask.lease, node)
    end
  else
    redis.call('HSET', hash, 'n:' .. node, string.format('%d %d %d %d %d %d %d',
      me.held, me.want, me.kept, me.stamp, me.ends, me.seq, me.cap))
  end
elseif want == 0 then
  redis.call('ZREM', line, node)
  redis.call('ZREM', seen, node)
end

-- The reserve --------------------------------------------------------------------------------

local owned, mine = {}, {}
for _, number in ipairs(ask.owned) do mine[number] = true end
for number = 1, ask.reserve do
  local name = 'r:' .. number
  local owner, ends = string.match(have[name] or '', '^(%S+) (%d+)$')
  if owner and owner ~= node and tonumber(ends) <= slow then owner = nil end
  local is_ours = owner == node
  if not owner then
    -- Free; but in an epoch's first time somebody may own it of whom this server does not know.
    is_ours = (slow < settled) and mine[number] or (slow >= settled and ask.may_own and #owned == 0)
  end
  if is_ours and ask.leaves then
    redis.call('HDEL', hash, name)
  elseif is_ours then
    owned[#owned + 1] = number
    redis.call('HSET', hash, name, string.format('%s %d', node, slow + ask.hold))
  end
end

-- The rate -----------------------------------------------------------------------------------

local permits = 0
if ask.rate > 0 then
  local tokens = have.tokens and tonumber(have.tokens) or (is_calm and 0 or ask.burst)
  tokens = min(ask.burst, tokens + min(passed, ask.slow_tick) / 1000 * ask.rate)
  permits = min(ask.permits, math.floor(tokens / max(1, rivals)))
  if permits == 0 and ask.permits > 0 and tokens >= 1 then permits = 1 end
  redis.call('HSET', hash, 'tokens', string.format('%.6f', tokens - permits))
end

redis.call('HSET', hash, 'server', server, 'wall', wall, 'clock', clock, 'slow', slow,
  'calm', calm, 'settled', settled,
  'law', string.format('%d %d %d %d', version, limit, ceiling, run))
redis.call('PEXPIRE', hash, ask.forget)
redis.call('PEXPIRE', line, ask.forget)
redis.call('PEXPIRE', seen, ask.forget)

local again = ask.poll
if me and want <= me.held then again = 2 * again end
again = ahead > 0 and 1000 + 10 * ahead or max(again, 5 * count)
local free = max(0, most - others - (me and me.held or 0))
return cjson.encode({
  stale = false,
  most = me and me.held or 0,
  bulk = me and (me.held - me.kept) or 0,
  keep = keep,
  free = free,
  free_bulk = max(0, most >= ask.keeps_from and free - 1 or free),
  rivals = rivals + queued,
  again = again,
  calm = max(0, calm - clock),
  version = version, limit = limit, ceiling = ceiling,
  owned = owned,
  permits = permits,
})
"""

SCRIPT = Script("leases", PROLOGUE + BODY, wants_run_id=True)
