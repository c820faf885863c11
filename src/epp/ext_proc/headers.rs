//! Headers of an exchange: what the client sent, and what we change.

use std::borrow::Cow;

use bytes::Bytes;

/// `ip:port[,ip:port…]` of the picked endpoints; ours to Envoy, and the key of the dynamic metadata.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Identity of a request in logs.
pub const REQUEST_ID: &str = "x-request-id";
/// Headers with which a router tells the sidecar of a pod where else to go. From a client they would
/// make our pods call anybody, so they are always removed unless we set them.
pub const SIDECAR_HEADERS: [&str; 4] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
];

/// Headers as received: names in lower case, in order, repeated ones as they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderList(Vec<(String, Bytes)>);

impl HeaderList {
    /// From name and value, names in any case.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, Bytes)>) -> Self {
        let lower = |(mut name, value): (String, Bytes)| {
            name.make_ascii_lowercase();
            (name, value)
        };
        Self(pairs.into_iter().map(lower).collect())
    }

    /// The first value of a header that is UTF-8 text.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(known, _)| known == name)?;
        std::str::from_utf8(value).ok()
    }

    /// Is there such a header?
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

/// Changes to the headers of a message. A name is set once, or removed, or untouched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    set: Vec<(Cow<'static, str>, Bytes)>,
    remove: Vec<&'static str>,
}

impl HeaderEdits {
    /// No changes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a header, whatever it was before.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Bytes>) {
        let name = name.into();
        self.remove.retain(|removed| *removed != name);
        self.set.retain(|(known, _)| *known != name);
        self.set.push((name, value.into()));
    }

    /// Removes a header, unless [`set`](Self::set) sets it later.
    pub fn remove(&mut self, name: &'static str) {
        self.set.retain(|(known, _)| *known != name);
        if !self.remove.contains(&name) {
            self.remove.push(name);
        }
    }

    /// What is set, in order, and what is removed.
    #[must_use]
    pub fn into_parts(self) -> (Vec<(Cow<'static, str>, Bytes)>, Vec<&'static str>) {
        (self.set, self.remove)
    }

    /// What is set, in order.
    #[must_use]
    pub fn sets(&self) -> &[(Cow<'static, str>, Bytes)] {
        &self.set
    }

    /// What is removed.
    #[must_use]
    pub fn removes(&self) -> &[&'static str] {
        &self.remove
    }
}
