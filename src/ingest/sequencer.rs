//! Gap, duplicate, restart and replay logic of one publisher: a state machine without sockets.
