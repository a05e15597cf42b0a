"""What the scripts of `claims_scripts.py` have in common: it stands before each of them.

What a script costs its server is the number of commands that it runs and of records that it reads.
So a node's whole record is one field of one hash, nodes that lend all they may are passed over
without reading theirs, and what a script changed is written by one HSET at its end (`save`).
"""

COMMON = """
local P = KEYS[1] .. ':'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
local me, details, zone = ARGV[2], ARGV[3], ARGV[4]
local FILLER, DOUBTED, GRANT, PART = ARGV[5] + 0, ARGV[6] + 0, ARGV[7] + 0, ARGV[8] + 0
local WHOLE, STUCK, BAN = ARGV[9] + 0, ARGV[10] + 0, ARGV[11] + 0
local MOST, EACH, FILLER_MOST, FILLER_EACH = ARGV[12] + 0, ARGV[13] + 0, ARGV[14] + 0, ARGV[15] + 0
local WHOLES, SHARE, token = ARGV[16] + 0, ARGV[17] + 0, ARGV[18]
local FIRST = 19  -- of the arguments that are this script's own
local BLOB, HASHES, BY, BANNED = P .. 'blob', P .. 'hashes', P .. 'by', P .. 'banned'
local NODES, WHOLLY, FULL = P .. 'nodes', P .. 'whole', P .. 'full'
local ANY = '*'
-- Generation and filler of the blob, and when that one's lease ends, when its entry has been read.
local GEN, FILLS, UP_TO = '', '', 0

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
  FILLS, UP_TO = blob.filler, (found[4] or 0) + 0
  return blob
end

-- Records of nodes that were read, false for those that have none; whose were changed, and of
-- these who lends more or less.
local records, changed, lenders = {}, {}, {}
local DETAILS, UNTIL, IS_WHOLE, MASK, OF, TAKES, LENT, LINED = 1, 2, 3, 4, 5, 6, 7, 8
-- What they take: stripe, until, rank and token after one another; what they lend: the same
-- without the rank.
local function unended(list, width)
  local kept = {}
  for at = 1, #list, width do
    if list[at + 1] > now then
      for n = at, at + width - 1 do kept[#kept + 1] = list[n] end
    end
  end
  return kept
end

local function leave(node)
  local text = redis.call('HGET', NODES, node)
  if text then
    local its = string.match(cmsgpack.unpack(text)[DETAILS], '%z([^%z]*)%z')
    redis.call('SREM', P .. 'zone:' .. its, node)
  end
  redis.call('HDEL', NODES, node)
  redis.call('ZREM', WHOLLY, node)
  redis.call('ZREM', FULL, node)
  records[node], changed[node] = false, nil
end

local function read(names)
  local lacking = {}
  for _, node in ipairs(names) do
    if records[node] == nil then
      records[node] = false
      lacking[#lacking + 1] = node
    end
  end
  if #lacking == 0 then return end
  for n, text in ipairs(redis.call('HMGET', NODES, unpack(lacking))) do
    if text then
      local record = cmsgpack.unpack(text)
      if record[UNTIL] <= now then
        leave(lacking[n])
      else
        record[TAKES] = record[OF] == GEN and unended(record[TAKES], 4) or {}
        record[LENT], record[OF] = unended(record[LENT], 3), GEN
        records[lacking[n]] = record
      end
    end
  end
end

local function introduce()
  redis.call('SADD', P .. 'zone:' .. zone, me)
  keep(P .. 'zone:' .. zone, WHOLE)
end
-- This node's record, renewed: one of a part for as long as parts live.
local function mine()
  read({me})
  local record = records[me]
  if not record then
    record = {details, 0, 0, '', GEN, {}, {}, 0}
    records[me] = record
    introduce()
  end
  if record[IS_WHOLE] == 0 then record[UNTIL] = now + PART end
  changed[me] = true
  return record
end

-- How much a node may lend: in all, and of one stripe.
local function limits(node)
  if node == FILLS then return FILLER_MOST, FILLER_EACH end
  return MOST, EACH
end
-- Note when the first grant ends of those of a node that lends as much as it may.
local function note_full(node)
  local lent, soonest = records[node][LENT], now + GRANT
  if #lent / 3 < limits(node) then
    redis.call('ZREM', FULL, node)
    return
  end
  for at = 1, #lent, 3 do soonest = math.min(soonest, lent[at + 1]) end
  redis.call('ZADD', FULL, soonest, node)
  keep(FULL, GRANT)
end
local function lends(node, lent)
  records[node][LENT] = lent
  changed[node], lenders[node] = true, true
end

local function save()
  for node in pairs(lenders) do note_full(node) end
  local said, ms = {}, 0
  for node in pairs(changed) do
    said[#said + 1] = node
    said[#said + 1] = cmsgpack.pack(records[node])
    ms = math.max(ms, records[node][IS_WHOLE] == 1 and WHOLE or PART)
  end
  if #said == 0 then return end
  redis.call('HSET', NODES, unpack(said))
  keep(NODES, ms)
end

local function line_up(stripe)
  local place = time[1] * 1000000 + time[2]
  for _, its in ipairs({zone, ANY}) do
    local key = P .. 'at:' .. stripe .. ':' .. its
    redis.call('ZADD', key, 'NX', place, me)
    keep(key, PART)
  end
end

local function without(list, width, stripe, held)
  local kept = {}
  for at = 1, #list, width do
    if list[at] ~= stripe or (held and list[at + width - 1] ~= held) then
      for n = at, at + width - 1 do kept[#kept + 1] = list[n] end
    end
  end
  return kept
end

-- `record` is this node's own.
local function enter(record, stripe, rank, giver, held)
  local takes = without(record[TAKES], 4, stripe)
  for _, field in ipairs({stripe, now + GRANT, rank, held}) do takes[#takes + 1] = field end
  record[TAKES] = takes
  read({giver})
  local its = records[giver]
  if its then
    local lent = without(its[LENT], 3, stripe, held)
    for _, field in ipairs({stripe, now + GRANT, held}) do lent[#lent + 1] = field end
    lends(giver, lent)
  end
  line_up(stripe)
end

-- Grants that have ended, as arguments from `at` on, `count` times: generation, giver, stripe,
-- token, and 'done' if the stripe is there, 'died' if its giver is no more.
local function give_back(at, count)
  local givers = {me}
  for n = 0, count - 1 do givers[#givers + 1] = ARGV[at + 5 * n + 1] end
  read(givers)
  for n = 0, count - 1 do
    local from = at + 5 * n
    local generation, giver, stripe = ARGV[from], ARGV[from + 1], ARGV[from + 2] + 0
    local held, word = ARGV[from + 3], ARGV[from + 4]
    if word == 'died' and giver == FILLS and UP_TO > now + DOUBTED then
      UP_TO = now + DOUBTED
      redis.call('HSET', BLOB, 'until', UP_TO)
    end
    if records[giver] then lends(giver, without(records[giver][LENT], 3, stripe, held)) end
    if generation == GEN then
      local record = mine()
      record[TAKES] = without(record[TAKES], 4, stripe, held)
      if word == 'done' and record[IS_WHOLE] == 0 then
        record[MASK] = with_bit(record[MASK], stripe)
      end
    end
  end
end

local function rank_in(record, stripe)
  if record[IS_WHOLE] == 1 or bit_of(record[MASK], stripe) then return 0 end
  local takes = record[TAKES]
  for at = 1, #takes, 4 do
    if takes[at] == stripe then return takes[at + 2] end
  end
  return nil
end

local function view(blob, known, holdings)
  local hashes = redis.call('GETRANGE', HASHES, known * 32, -1)
  local by = redis.call('GETRANGE', BY, known * 16, -1)
  local nodes = redis.call('HLEN', NODES)
  return {blob.gen, blob.size, hashes, by, blob.filler, nodes, holdings}
end
"""
