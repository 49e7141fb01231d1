//! A run that writes shards: which shards there are ([`plan`]), which of them are this process's ([`ranks`]), what of a shard was done
//! before ([`journal`]), and the folder that they go to ([`folder`]).
//!
//! A shard is a contiguous run of images and depends on nothing but these and the model: neither on batches, threads and ranks nor
//! on what was interrupted. So any number of processes may work on a folder, even two on one shard: both write the same bytes.

pub(crate) mod folder;
pub(crate) mod journal;
pub(crate) mod plan;
pub(crate) mod ranks;
