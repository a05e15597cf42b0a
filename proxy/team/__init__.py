"""Several processes, one cache: a leader and those who follow it (DESIGN D15).

Theory of operation
-------------------
*Roles.* Processes on one cache directory agree by ``flock`` on its file LOCK. Who holds it is the
*leader*: the only one with a gate, tokens, flights and write access to store and index. The others
are *followers*. They answer hits themselves, out of files and a read-only view of the index
(``hits.py``), and ask the leader for everything else over a Unix socket beside LOCK. Only the
kernel decides who leads: there is no election, no time-out and no message that makes a leader, so
there are never two. A leader that is stopped (SIGSTOP) keeps the lock and nobody takes its place;
its followers notice by the missing beats, serve hits, and say 503 to the rest until it goes on.

*What passes over the socket.* ``frames.py`` cuts the stream into frames, ``channel.py`` carries
them, and descriptors beside them. A follower opens *calls*, each with a number: one request of one
client. The leader answers a call by its own ``Puller``, as if the client had come to it: for that
client's name and address (fairness), with the age of the request (deadlines), through the same
repository (permission). So a follower's client waits in the same queue, joins the same flights and
is denied by the same words. The answer to a blob is followed by *pieces*, one for each time that
the follower asks for more: a span of a file, whose descriptor comes along once (SCM_RIGHTS), or
bytes where there is no file (a window, a turn of a reader's own). The leader's ``Reader`` gives
them out, so what a follower may send ends at the contiguous mark, the last bytes wait for the
verdict, and a wrong digest ends the call with an error, on which the follower resets its client's
connection. The bytes themselves do not pass the socket: the follower sends them from the file.

*Tasks* are the leader's. A call "task" is one question about them, a call "watch" a listener: each
word is asked for like a piece, so that a slow one is slow at the leader, whose queue is bounded.
When the leader goes the question is asked again of the next one, which has the tasks from the
index; an order carries the id of its task, so it is taken once (``tasks.py``).

*Who counts.* A call that is open is a reader of the flight at the leader. It ends with the answer,
by "stop" when the client has left, or with the channel when the follower has died. Uses of what the
follower serves by itself are told in lots, for the order of eviction, and to a leader that fetches
ahead which manifests were pulled. A file that is evicted while a follower sends it stays whole for
it: its descriptor outlives the name. A blob that is evicted before the follower opens it is a miss,
which the leader answers.

*What a follower remembers.* Links, what is held, manifests and small blobs, and what a tag is: out
of that it answers as if it led, the hot path included. The leader takes back what is true no more:
"doubt" of a tag, "unlinked" of a repository, "gone" of blobs; each at once, and the last two again
when row and file have gone, for who reads them in between. These words come in order with its
answers and are heeded when they arrive, so a follower is as much too late as they are on their way.
When the channel ends nothing is remembered any more, and what rested on it is withdrawn.

*The leader goes.* The kernel closes its sockets and frees LOCK. Each follower tries LOCK and the
socket in turn, many times a second; the one that gets LOCK opens the store, takes over the files of
unfinished fills (``store/recovery.py``), and listens. Requests that had no answer yet are asked
again there. A body that is under way goes on: the follower knows how many bytes its client has
had, asks the new leader for the same digest, and leaves them out (``front.py``); so the last bytes
of a whole blob wait for the verdict as before, whatever the new leader has of it. The new leader
has the bytes in the file it took over, hashes them, and continues the fill at their end. Which
those are in a file that was written out of order, ``store/counted.py`` knows.

*Threats.* The socket lets whoever connects act as any client, and read any blob that the
repositories' rules allow it to name a repository for; whoever can put another socket in its place
can feed followers with wrong bytes. So: mode 0600, made anew by each leader under LOCK; each side
asks the kernel who the other is (SO_PEERCRED) and speaks to its own user only; frames are bounded,
numbers are checked, everything that arrives is parsed by the same types as a client's request, and
a peer that breaks a rule is disconnected. A process of the same user is trusted: it can write the
cache directory itself. Two containers that share a volume must therefore run as the same user, in
one user namespace, on one machine; over NFS flock may span machines but the socket does not, and
the second process is refused as before.
"""
