//! What the server was asked, for tests that want to know what arrived.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use hyper::{HeaderMap, Method, body::Bytes};

use crate::support::sync::lock;

/// Requests kept.
const KEPT: usize = 256;
/// Bytes of a body kept.
const KEPT_BODY: usize = 64 << 10;

/// A completion request as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// `POST`.
    pub method: String,
    /// Path without query.
    pub path: String,
    /// Headers in order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body's first 64 KiB.
    pub body: Bytes,
}

impl RequestHead {
    /// The first value of a header; `name` in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }
}

/// The last requests.
#[derive(Debug, Default)]
pub(in super::super) struct Heads {
    seen: AtomicU64,
    last: Mutex<VecDeque<RequestHead>>,
}

impl Heads {
    pub(in super::super) fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    pub(in super::super) fn last(&self) -> Vec<RequestHead> {
        lock(&self.last).iter().cloned().collect()
    }

    pub(super) fn count(&self) {
        self.seen.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn keep(&self, method: &Method, path: &str, headers: &HeaderMap, body: &Bytes) {
        let headers = headers
            .iter()
            .map(|(name, value)| {
                (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            })
            .collect();
        let body = Bytes::copy_from_slice(&body[..body.len().min(KEPT_BODY)]);
        let head = RequestHead { method: method.to_string(), path: path.to_owned(), headers, body };
        let mut last = lock(&self.last);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(head);
    }
}
