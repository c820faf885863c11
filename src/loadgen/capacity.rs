//! Published results of routing policies on fleets, and what our model of an engine says of the same
//! traffic.
