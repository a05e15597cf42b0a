"""The scripts of `claims_redis.py`, whose opening says which keys there are.

`local_claims.py` states the same rules in Python; one conformance suite plays both.
"""

from __future__ import annotations

from proxy.fleet.script import Script

_COMMON = """
local P = KEYS[1] .. ':'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
local me, details, zone = ARGV[2], ARGV[3], ARGV[4]
local FILLER, GRANT, PART, WHOLE = ARGV[5] + 0, ARGV[6] + 0, ARGV[7] + 0, ARGV[8] + 0
local STUCK, BAN = ARGV[9] + 0, ARGV[10] + 0
local MOST, EACH, FILLER_MOST, FILLER_EACH = ARGV[11] + 0, ARGV[12] + 0, ARGV[13] + 0, ARGV[14] + 0
local WHOLES, SHARE, token = ARGV[15] + 0, ARGV[16] + 0, ARGV[17]
local FIRST = 18  -- of the arguments that are this script's own
local BLOB, HASHES, BY, BANNED = P .. 'blob', P .. 'hashes', P .. 'by', P .. 'banned'
local WHO, PARTS, WHOLLY = P .. 'who', P .. 'part', P .. 'whole'
local LOOKS, ANY = 16, '*'
local GEN = ''  -- of the blob, when its entry has been read

local function until_text(at) return string.format('%016.0f', at) end
local function keep(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, 2 * ms) end
end

local function bit_of(mask, stripe)
  local byte = string.byte(mask, math.floor(stripe / 8) + 1)
  return byte ~= nil and bit.band(byte, bit.lshift(1, stripe % 8)) ~= 0
end
local function with_bit(mask, stripe)
  local at = math.floor(stripe / 8) + 1
  mask = mask .. string.rep('\\0', at - #mask)
  local byte = bit.bor(string.byte(mask, at), bit.lshift(1, stripe % 8))
  return string.sub(mask, 1, at - 1) .. string.char(byte) .. string.sub(mask, at + 1)
end

-- The blob's entry: one without a generation begins another. A filler that is late is none.
local function entry()
  local found = redis.call('HMGET', BLOB, 'gen', 'size', 'filler', 'until', 'news')
  local blob = {gen = found[1], size = found[2] or '', filler = found[3] or ''}
  if not blob.gen then
    blob.gen = token
    redis.call('HSET', BLOB, 'gen', token)
  end
  GEN = blob.gen
  keep(BLOB, WHOLE)
  if blob.filler ~= '' and found[5] + STUCK <= now then
    redis.call('ZADD', BANNED, now + STUCK, blob.filler)
    keep(BANNED, STUCK)
    redis.call('HDEL', BLOB, 'filler')
    blob.filler = ''
  elseif blob.filler ~= '' and found[4] + 0 <= now then
    blob.filler = ''
  end
  return blob
end

local function leave(node)
  local who = redis.call('HGET', WHO, node)
  if who then
    local its = string.match(who, '%z([^%z]*)%z')
    redis.call('SREM', P .. 'zone:' .. its, node)
  end
  redis.call('HDEL', WHO, node)
  redis.call('HDEL', PARTS, node)
  redis.call('ZREM', WHOLLY, node)
end

-- What a node has: nil if nothing is known, or no longer; else whether all, the mask and until.
local function having(node)
  local at = redis.call('ZSCORE', WHOLLY, node)
  if at and at + 0 > now then return true, '', at + 0 end
  local part = redis.call('HGET', PARTS, node)
  if part and string.sub(part, 1, 16) + 0 > now then
    return false, string.sub(part, 17), string.sub(part, 1, 16) + 0
  end
  leave(node)
  return nil
end

local function receiving(node)
  local key, found = P .. 'takes:' .. node, {}
  local all = redis.call('HGETALL', key)
  for n = 1, #all, 2 do
    local at, rank, gen, held = string.match(all[n + 1], '^(%d+) (%d+) (%S+) (.*)$')
    if at + 0 > now and gen == GEN then
      found[all[n]] = {rank = rank + 0, token = held}
    else
      redis.call('HDEL', key, all[n])
    end
  end
  return found
end

local function lent(node)
  local key = P .. 'lent:' .. node
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  return redis.call('ZRANGE', key, 0, -1)
end

local function may_lend(blob, node, stripe)
  local most, each = MOST, EACH
  if node == blob.filler then most, each = FILLER_MOST, FILLER_EACH end
  local all, same = lent(node), 0
  for _, one in ipairs(all) do
    if string.match(one, '^(%d+) ') == stripe then same = same + 1 end
  end
  return #all < most and same < each
end

local function introduce()
  redis.call('HSET', WHO, me, details)
  redis.call('SADD', P .. 'zone:' .. zone, me)
  keep(WHO, WHOLE)
  keep(P .. 'zone:' .. zone, WHOLE)
end
local function set_part(mask)
  redis.call('HSET', PARTS, me, until_text(now + PART) .. mask)
  redis.call('ZREM', WHOLLY, me)
  keep(PARTS, PART)
  introduce()
end
-- Renews what this node has as a part; leaves a whole one as it is.
local function renew_mine()
  local whole, mask = having(me)
  if not whole then set_part(mask or '') end
  return whole, mask or ''
end

local function line_up(stripe)
  local place = time[1] * 1000000 + time[2]
  for _, its in ipairs({zone, ANY}) do
    local key = P .. 'at:' .. stripe .. ':' .. its
    redis.call('ZADD', key, 'NX', place, me)
    keep(key, PART)
  end
end

local function enter(stripe, rank, giver, held)
  local mine, its = P .. 'takes:' .. me, P .. 'lent:' .. giver
  local entered = {until_text(now + GRANT), rank, GEN, held}
  redis.call('HSET', mine, stripe, table.concat(entered, ' '))
  redis.call('ZADD', its, now + GRANT, stripe .. ' ' .. held)
  keep(mine, GRANT)
  keep(its, GRANT)
  line_up(stripe)
end

-- nil if it can give nothing of the stripe, 0 if it has it, else its rank.
local function rank_of(node, stripe)
  if node == me then return nil end
  local whole, mask = having(node)
  if whole == nil then return nil end
  if whole or bit_of(mask, stripe + 0) then return 0 end
  local held = redis.call('HGET', P .. 'takes:' .. node, stripe)
  if not held then return nil end
  local at, rank, gen = string.match(held, '^(%d+) (%d+) (%S+) ')
  if at + 0 <= now or gen ~= GEN then return nil end
  return rank + 0
end

local function view(blob, known, holdings)
  local hashes = redis.call('GETRANGE', HASHES, known * 32, -1)
  local by = redis.call('GETRANGE', BY, known * 16, -1)
  local nodes = redis.call('HLEN', WHO)
  return {blob.gen, blob.size, hashes, by, blob.filler, nodes, holdings}
end
local function sampled(blob)
  local names, seen, holdings = {}, {}, {}
  local function add(found)
    for _, node in ipairs(found) do
      if not seen[node] and node ~= me then
        seen[node] = true
        names[#names + 1] = node
      end
    end
  end
  if blob.filler ~= '' then add({blob.filler}) end
  add(redis.call('SRANDMEMBER', P .. 'zone:' .. zone, SHARE))
  add(redis.call('ZRANDMEMBER', WHOLLY, SHARE))
  add(redis.call('HRANDFIELD', PARTS, SHARE))
  for _, node in ipairs(names) do
    local whole, mask = having(node)
    if whole ~= nil then
      local ranks = {}
      for stripe, held in pairs(receiving(node)) do
        ranks[#ranks + 1] = stripe + 0
        ranks[#ranks + 1] = held.rank
      end
      local who = redis.call('HGET', WHO, node)
      if who then
        holdings[#holdings + 1] = {node, who, whole and 1 or 0, mask, #lent(node), ranks}
      end
    end
  end
  return holdings
end
"""


def _script(name: str, text: str) -> Script:
    return Script(f"claims_{name}", _COMMON + text)


LOOK = _script(
    "look",
    """
local blob = entry()
return view(blob, ARGV[FIRST] + 0, sampled(blob))
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
renew_mine()
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
local whole, mask = renew_mine()
for stripe = first, count - 1 do
  mask = with_bit(mask, stripe)
  line_up(string.format('%d', stripe))
end
if not whole then set_part(mask) end
return count
""",
)

SETTLE = _script(
    "settle",
    """
if entry().filler == me then redis.call('HDEL', BLOB, 'filler') end
return 1
""",
)

TAKE = _script(
    "take",
    """
local blob = entry()
renew_mine()
local known, room = ARGV[FIRST] + 0, ARGV[FIRST + 1] + 0
local mine, granted, missing, numbers, avoid = receiving(me), {}, {}, 0, {}
for n = 1, ARGV[FIRST + 2] do avoid[ARGV[FIRST + 2 + n]] = true end

-- Whether it was granted, and whether anybody has it or receives it.
local function try(node, stripe, limit)
  local rank = rank_of(node, stripe)
  if not rank then return false, false end
  if avoid[node] then return false, nil end
  if rank >= limit or not may_lend(blob, node, stripe) then return false, true end
  numbers = numbers + 1
  local held = token .. '.' .. numbers
  enter(stripe, rank + 1, node, held)
  granted[#granted + 1] = {stripe + 0, node, redis.call('HGET', WHO, node), rank + 1, held}
  return true, true
end

-- Of those in a queue; who is passed over goes to its end, who is no giver any more leaves it.
local function from_queue(key, stripe, limit)
  local is_known = false
  local place = time[1] * 1000000 + time[2]
  for number, node in ipairs(redis.call('ZRANGE', key, 0, LOOKS - 1)) do
    local done, known_here = try(node, stripe, limit)
    is_known = is_known or known_here
    if done then return true, true end
    if known_here or node == me or avoid[node] then
      redis.call('ZADD', key, place + number, node)
    else
      redis.call('ZREM', key, node)
    end
  end
  return false, is_known
end

local function wish(stripe, limit, named)
  local is_known = false
  local function from(nodes)
    for _, node in ipairs(nodes) do
      local done, known_here = try(node, stripe, limit)
      is_known = is_known or known_here
      if done then return true end
    end
    return false
  end
  if from(named) then return end
  for _, its in ipairs({zone, ANY}) do
    local done, known_here = from_queue(P .. 'at:' .. stripe .. ':' .. its, stripe, limit)
    is_known = is_known or known_here
    if done then return end
  end
  if from(redis.call('ZRANDMEMBER', WHOLLY, LOOKS)) then return end
  if not is_known then missing[#missing + 1] = stripe + 0 end
end

local at = FIRST + 3 + ARGV[FIRST + 2]
while at <= #ARGV do
  local stripe, limit, count, named = ARGV[at], ARGV[at + 1] + 0, ARGV[at + 2] + 0, {}
  for n = 1, count do named[n] = ARGV[at + 2 + n] end
  at = at + 3 + count
  if #granted < room and not mine[stripe] then wish(stripe, limit, named) end
end
return {granted, missing, view(blob, known, {})}
""",
)

GIVE_BACK = _script(
    "give_back",
    """
local generation, giver = ARGV[FIRST], ARGV[FIRST + 1]
local stripe, held = ARGV[FIRST + 2], ARGV[FIRST + 3]
redis.call('ZREM', P .. 'lent:' .. giver, stripe .. ' ' .. held)
if entry().gen ~= generation then return 0 end
local whole, mask = renew_mine()
local received = receiving(me)[stripe]
if received and received.token == held then redis.call('HDEL', P .. 'takes:' .. me, stripe) end
if ARGV[FIRST + 4] == '1' and not whole then set_part(with_bit(mask, stripe + 0)) end
return 1
""",
)

HOLD = _script(
    "hold",
    """
local blob = entry()
if ARGV[FIRST + 1] == '*' then
  redis.call('ZREMRANGEBYSCORE', WHOLLY, '-inf', now)
  if not redis.call('ZSCORE', WHOLLY, me) and redis.call('ZCARD', WHOLLY) >= WHOLES then
    return 0
  end
  redis.call('ZADD', WHOLLY, now + WHOLE, me)
  redis.call('HDEL', PARTS, me)
  redis.call('DEL', P .. 'takes:' .. me)
  keep(WHOLLY, WHOLE)
  keep(HASHES, WHOLE)
  keep(BY, WHOLE)
  introduce()
  return 1
end
if blob.gen ~= ARGV[FIRST] then return 0 end
local mask = ARGV[FIRST + 1]
set_part(mask)
for stripe = 0, 8 * #mask - 1 do
  if bit_of(mask, stripe) then line_up(string.format('%d', stripe)) end
end
for at = FIRST + 2, #ARGV, 4 do
  enter(ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
end
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
redis.call('DEL', BLOB, HASHES, BY, PARTS)
redis.call('HSET', BLOB, 'gen', token)
keep(BLOB, WHOLE)
return 1
""",
)
