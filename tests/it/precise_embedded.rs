//! The index in the endpoint picker's process, fed by mock engines over their real sockets.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kv_indexer::{
    epp::{
        datalayer::{Endpoint, EndpointInfo, EndpointName, Endpoints},
        precise::{
            EndpointMatch, PrefixIndex, Query,
            embedded::{EmbeddedConfig, start},
        },
    },
    hash::{Models, PromptKeys},
    loadgen::engine::{Engine, EngineHandle, EngineOptions},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::support::{http::post, patience};
