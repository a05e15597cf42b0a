"""The scripts of `claims_redis.py`, whose opening says which keys there are.

`local_claims.py` states the same rules in Python; one conformance suite plays both.
What they share is in `claims_common.py`.
"""

from __future__ import annotations

from proxy.fleet.claims_common import COMMON
from proxy.fleet.script import Script


def _script(name: str, text: str) -> Script:
    return Script(f"claims_{name}", COMMON + text)


LOOK = _script(
    "look",
    """
local blob = entry()
local names, seen, holdings = {}, {[me] = true}, {}
local function add(found)
  for _, node in ipairs(found) do
    if not seen[node] then
      seen[node] = true
      names[#names + 1] = node
    end
  end
end
if blob.filler ~= '' then add({blob.filler}) end
add(redis.call('SRANDMEMBER', P .. 'zone:' .. zone, SHARE))
add(redis.call('ZRANDMEMBER', WHOLLY, SHARE))
add(redis.call('HRANDFIELD', NODES, SHARE))
read(names)
for _, node in ipairs(names) do
  local record = records[node]
  if not record then  -- its record has ended with all the others, a set of names lives longer
    redis.call('SREM', P .. 'zone:' .. zone, node)
  else
    local ranks, takes = {}, record[TAKES]
    for at = 1, #takes, 4 do
      ranks[#ranks + 1] = takes[at]
      ranks[#ranks + 1] = takes[at + 2]
    end
    local lending = #record[LENT] / 3
    holdings[#holdings + 1] = {
      node, record[DETAILS], record[IS_WHOLE], record[MASK], lending, ranks
    }
  end
end
return view(blob, ARGV[FIRST] + 0, holdings)
""",
)

FILL = _script(
    "fill",
    """
local blob = entry()
local banned = redis.call('ZSCORE', BANNED, me)
if (blob.filler ~= '' and blob.filler ~= me) or (banned and banned + 0 > now) then
  return blob.filler
end
if blob.filler == '' then redis.call('HSET', BLOB, 'filler', me, 'news', now) end
if blob.size == '' and ARGV[FIRST] ~= '' then redis.call('HSET', BLOB, 'size', ARGV[FIRST]) end
redis.call('HSET', BLOB, 'until', now + FILLER)
mine()
save()
return me
""",
)

PUBLISH = _script(
    "publish",
    """
local blob = entry()
if blob.filler ~= me then return -1 end
local size, first, hashes, by = ARGV[FIRST], ARGV[FIRST + 1] + 0, ARGV[FIRST + 2], ARGV[FIRST + 3]
redis.call('HSET', BLOB, 'size', size, 'until', now + FILLER)
local count = redis.call('STRLEN', HASHES) / 32
if first ~= count then return count end
count = redis.call('APPEND', HASHES, hashes) / 32
redis.call('APPEND', BY, by)
keep(HASHES, WHOLE)
keep(BY, WHOLE)
redis.call('HSET', BLOB, 'news', now)
local record = mine()
for stripe = first, count - 1 do
  if record[IS_WHOLE] == 0 then record[MASK] = with_bit(record[MASK], stripe) end
  line_up(stripe)
end
save()
return count
""",
)

SETTLE = _script(
    "settle",
    """
if entry().filler == me then
  redis.call('HDEL', BLOB, 'filler')
  redis.call('ZREM', FULL, me)
end
return 1
""",
)

TAKE = _script(
    "take",
    """
-- How many of a queue are looked at, of how many that could give the best is chosen, what the
-- filler costs more than all others, and among how many those of other zones are looked for.
local LOOKS, CHOICES, LAST, FAR = 8, 4, 1000, 32
local blob = entry()
local known, room, ended = ARGV[FIRST] + 0, ARGV[FIRST + 1] + 0, ARGV[FIRST + 2] + 0
give_back(FIRST + 3, ended)
local at = FIRST + 3 + 5 * ended
local own, granted, missing, avoid = mine(), {}, {}, {}
for n = 1, ARGV[at] do avoid[ARGV[at + n]] = true end
at = at + 1 + ARGV[at]

local wishes, receives = {}, {}
for n = 1, #own[TAKES], 4 do receives[own[TAKES][n]] = true end
local published = redis.call('STRLEN', HASHES) / 32
for n = at, #ARGV, 3 do
  local stripe, few = ARGV[n] + 0, -1  -- what is urgent comes first
  if stripe < published then
    if ARGV[n + 2] ~= '1' then  -- as many have or receive it
      few = redis.call('ZCARD', P .. 'at:' .. ARGV[n] .. ':' .. ANY)
    end
    wishes[#wishes + 1] = {
      stripe = stripe, limit = ARGV[n + 1] + 0, few = few, place = #wishes, busy = 0, unread = {}
    }
  end
end
table.sort(wishes, function(one, other)
  if one.few ~= other.few then return one.few < other.few end
  return one.place < other.place
end)

-- Which nodes lend as much as they may: they need not be read. Of those that something was given
-- back to just now it is not noted yet.
local full = {}
local function weigh(nodes)
  local unknown = {}
  for _, node in ipairs(nodes) do
    if full[node] == nil then
      full[node] = false
      if not lenders[node] then unknown[#unknown + 1] = node end
    end
  end
  if #unknown == 0 then return end
  for n, ends in ipairs(redis.call('ZMSCORE', FULL, unpack(unknown))) do
    full[unknown[n]] = ends and ends + 0 > now
  end
end

-- How much it lends; nil if it may not lend this as well.
local function lending(node, stripe)
  local most, each = limits(node)
  local lent, same = records[node][LENT], 0
  if #lent / 3 >= most then return nil end
  for n = 1, #lent, 3 do
    if lent[n] == stripe then same = same + 1 end
  end
  if same >= each then return nil end
  return #lent / 3
end

-- What the node offers now, if anything; and its rank, nil if it cannot give the stripe at all. A
-- wish notes whether anybody can who is not to be avoided, and how many of those lend enough.
local function offer(node, wish)
  if full[node] then
    if not avoid[node] then
      wish.busy = wish.busy + 1
      wish.unread[#wish.unread + 1] = node
    end
    return nil, 0
  end
  read({node})
  local record = node ~= me and records[node]
  local rank = record and rank_in(record, wish.stripe)
  if not rank or avoid[node] then return nil, rank end
  wish.is_known = true
  if rank >= wish.limit then return nil, rank end
  local lends = lending(node, wish.stripe)
  if not lends then
    wish.busy = wish.busy + 1
    return nil, rank
  end
  local cost = lends + rank
  if node == FILLS then cost = cost + LAST end
  return {node = node, rank = rank, cost = cost}, rank
end

local function better(one, other)
  if not one or (other and other.cost < one.cost) then return other end
  return one
end

-- The first that may be chosen, in one go.
local function read_some(nodes)
  local some = {}
  for _, node in ipairs(nodes) do
    if not full[node] and #some < CHOICES then some[#some + 1] = node end
  end
  read(some)
end

local place = time[1] * 1000000 + time[2]
-- The first in a queue that are not of this zone. When they are few, those of this zone go to its
-- end, so that the next take sees others.
local function elsewhere(key)
  local nodes, found, behind = redis.call('ZRANGE', key, 0, FAR - 1), {}, {}
  for n, is_here in ipairs(redis.call('SMISMEMBER', P .. 'zone:' .. zone, unpack(nodes))) do
    if is_here == 1 then
      behind[#behind + 1] = place + n
      behind[#behind + 1] = nodes[n]
    elseif #found < LOOKS then
      found[#found + 1] = nodes[n]
    end
  end
  if #found < LOOKS then redis.call('ZADD', key, unpack(behind)) end
  return found
end

-- The best of these, from a queue's front. Who may not lend goes to its end, who is no giver any
-- more leaves it.
local function of_queue(key, wish, nodes)
  nodes = nodes or redis.call('ZRANGE', key, 0, LOOKS - 1)
  wish.busy = 0
  if #nodes == 0 then return nil end
  weigh(nodes)
  read_some(nodes)
  local behind, gone, offers, best = {}, {}, 0, nil
  for number, node in ipairs(nodes) do
    local found, rank = offer(node, wish)
    if found then
      offers, best = offers + 1, better(best, found)
      if offers == CHOICES then break end
    elseif rank or node == me then
      behind[#behind + 1] = place + number
      behind[#behind + 1] = node
    else
      gone[#gone + 1] = node
    end
  end
  -- When it is the whole queue that was passed over, its order stays.
  if #behind > 0 and (best or #nodes == LOOKS) then redis.call('ZADD', key, unpack(behind)) end
  if #gone > 0 then
    redis.call('ZREM', key, unpack(gone))
    -- Who comes behind those is seen by the next take.
    if #nodes == LOOKS then wish.is_known = true end
  end
  return best
end

local wholly
local function of_wholes(wish)
  if not wholly then
    wholly = redis.call('ZRANDMEMBER', WHOLLY, LOOKS)
    weigh(wholly)
  end
  for _, node in ipairs(wholly) do
    local found = offer(node, wish)
    if found then return found end
  end
end

-- Of this zone, then of others, then of those that have all of it; the filler after all of these.
local function choose(wish)
  local own, any = P .. 'at:' .. wish.stripe .. ':' .. zone, P .. 'at:' .. wish.stripe .. ':' .. ANY
  local best = of_queue(own, wish)
  if best and best.node ~= FILLS then return best end
  local here = redis.call('ZCARD', own)
  if here >= LOOKS and here < redis.call('ZCARD', any) then
    if here > LOOKS then  -- those who come behind the ones that were passed over
      best = better(best, of_queue(own, wish))
      if best and best.node ~= FILLS then return best end
    end
    best = better(best, of_queue(any, wish, elsewhere(any)))
  elseif wish.busy == LOOKS then
    return best  -- nobody else has it: here there are enough, in a moment
  else
    best = better(best, of_queue(any, wish))
  end
  if (best and best.node ~= FILLS) or wish.busy == LOOKS then return best end
  return better(best, of_wholes(wish))
end

-- Has nobody the stripe, nor of those that were not read as they lend all they may?
local function is_missing(wish)
  if wish.is_known then return false end
  read(wish.unread)
  for _, node in ipairs(wish.unread) do
    if node ~= me and records[node] and rank_in(records[node], wish.stripe) then return false end
  end
  return true
end

for _, wish in ipairs(wishes) do
  if #granted >= room then break end
  if not receives[wish.stripe] then
    local found = choose(wish)
    if found then
      local held = token .. '.' .. #granted + 1
      enter(own, wish.stripe, found.rank + 1, found.node, held)
      local who = records[found.node][DETAILS]
      granted[#granted + 1] = {wish.stripe, found.node, who, found.rank + 1, held}
    elseif is_missing(wish) then
      missing[#missing + 1] = wish.stripe
    end
  end
end
save()
return {granted, missing, view(blob, known, {})}
""",
)

GIVE_BACK = _script(
    "give_back",
    """
entry()
give_back(FIRST, 1)
save()
return 1
""",
)

HOLD = _script(
    "hold",
    """
local blob = entry()
-- Of those that nobody has come across for long some leave now.
read(redis.call('HRANDFIELD', NODES, 8))
if ARGV[FIRST + 1] == '*' then
  redis.call('ZREMRANGEBYSCORE', WHOLLY, '-inf', now)
  if not redis.call('ZSCORE', WHOLLY, me) and redis.call('ZCARD', WHOLLY) >= WHOLES then
    return 0
  end
  redis.call('ZADD', WHOLLY, now + WHOLE, me)
  local record = mine()
  record[UNTIL], record[IS_WHOLE], record[MASK], record[TAKES] = now + WHOLE, 1, '', {}
  introduce()
  keep(WHOLLY, WHOLE)
  keep(HASHES, WHOLE)
  keep(BY, WHOLE)
  save()
  return 1
end
if blob.gen ~= ARGV[FIRST] then return 0 end
local record, mask = mine(), ARGV[FIRST + 1]
-- Queues live as long as a part does after the last that joined them: now and then anew.
local is_due = record[LINED] + PART / 2 <= now
for stripe = 0, 8 * #mask - 1 do
  if bit_of(mask, stripe) and (is_due or not bit_of(record[MASK], stripe)) then line_up(stripe) end
end
if is_due then
  record[LINED] = now
  introduce()
end
if record[IS_WHOLE] == 1 then redis.call('ZREM', WHOLLY, me) end
record[UNTIL], record[IS_WHOLE], record[MASK] = now + PART, 0, mask
for at = FIRST + 2, #ARGV, 4 do
  enter(record, ARGV[at] + 0, ARGV[at + 1] + 0, ARGV[at + 2], ARGV[at + 3])
end
save()
return 1
""",
)

WITHDRAW = _script("withdraw", "leave(me)\nreturn 1")

DROP = _script(
    "drop",
    """
if entry().gen ~= ARGV[FIRST] then return 0 end
local by = redis.call('GETRANGE', BY, 0, -1)
for at = 1, #by, 16 do
  local node = string.sub(by, at, at + 15)
  if node ~= me then redis.call('ZADD', BANNED, now + BAN, node) end
end
keep(BANNED, BAN)
local wholly = redis.call('ZRANGE', WHOLLY, 0, -1)
read(wholly)
redis.call('DEL', BLOB, HASHES, BY, NODES, FULL)
for _, node in ipairs(wholly) do
  if records[node] then
    records[node][TAKES], changed[node] = {}, true
  end
end
save()
redis.call('HSET', BLOB, 'gen', token)
keep(BLOB, WHOLE)
return 1
""",
)
