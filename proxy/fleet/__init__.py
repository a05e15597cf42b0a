"""The fleet: nodes that share one directory, a Redis or Valkey of their own.

The process that leads a cache directory is a node; its id is new each time it begins to lead. The
nodes know one another only by what they enter in the directory, and every entry expires by the
directory's clock: nothing is taken back by somebody who may be dead, and no number is kept that
could drift. The directory holds no bytes and is trusted with nothing: whoever can write to it can
waste the fleet's time, but not change what a client gets. It never learns a token, nor a denial.

A node without its directory is a node by itself: every question to it fails at once, and whoever
asked goes on with what is known. It heals by itself, and a hundred nodes heal without a storm.

    place.py      where the directory is (a URL); pure
    script.py     what is asked of it, and which keys belong together
    link.py       one connection; server.py: the few to one server; route.py: which server it is
    directory.py  the directory: up or down, and its mender; crowd.py: how late it may be
    members.py    who is there
    leases.py     how many sockets each node may hold: ledger.py (what a node may believe),
                  lease_script.py (what the directory does), lease_call.py, lease_rate.py
    claims.py     who has or fills which stripes: claims_redis.py, local_claims.py; what a node does
                  next: pursuit.py, steps.py, stripes.py, shunned.py (all pure)
    peers.py      taking stripes: connection.py, sockets.py, answer.py, protocol.py, pieces.py,
                  seal.py
    keeper.py     what this node said that it has, said again in time; announcer.py: what it stored
                  before, said after a start and to a directory that is new
    tags.py       what an upstream said, told to the others
    orders.py     what one node was told to do, and others are to do
    secret.py     what all these are sealed with, also while it is replaced

Nothing here knows `upstream` or `store`: what they need of the fleet they name themselves as a
small Protocol.
"""
