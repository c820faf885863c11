//! `grpcTls`, `auth` and `tokenizers`: how callers reach the API, and what makes tokens of their text.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde_json::Value;

use super::{HOUR_MS, IndexerConfig};
use crate::{
    support::{
        access::{Access, TokenError, Tokens},
        fields::{Fields, set},
        tls::{self, TlsOptions},
        units,
    },
    tokenize::{models::LocalConfig, pool::PoolConfig, render::RenderConfig},
};

/// How long one text may take unless configured. Callers that are in a hurry have deadlines.
const BUDGET: Duration = Duration::from_secs(1);

/// How long an engine may take for text, and for pictures and such, unless configured.
const RENDER_TIMEOUTS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];

/// TLS of the gRPC listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcTls {
    /// Certificate, versions, clients' authority.
    pub options: TlsOptions,
    /// Follow changes of the certificate's files.
    pub reload: bool,
}

/// Who may use what is not for everybody: the calls that change the index or tell what is in it, and
/// all pages but health and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Auth {
    /// File of bearer tokens.
    pub token_file: Option<PathBuf>,
    /// Without a token file, everybody may, on any address; else only on loopback.
    pub allow_without_token: bool,
}

/// How to open what is closed.
const CLOSED: &str = "set `auth.tokenFile`, or `auth.allowWithoutToken: true`";

impl Auth {
    /// Reads the tokens.
    ///
    /// # Errors
    ///
    /// A file that cannot be used.
    pub fn tokens(&self) -> Result<Option<Tokens>, TokenError> {
        self.token_file.as_deref().map(Tokens::read).transpose()
    }

    /// Who may, at a listener with this address; `proved` if its clients have to show certificates.
    #[must_use]
    pub fn access(&self, tokens: Option<&Tokens>, at: SocketAddr, proved: bool) -> Access {
        match tokens {
            Some(tokens) => Access::Bearer(tokens.clone()),
            None if proved || self.allow_without_token => Access::Everybody,
            None if at.ip().to_canonical().is_loopback() => Access::Everybody,
            None => Access::Nobody { setting: CLOSED },
        }
    }
}

/// What turns text into tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenizers {
    /// Tokenizers of this process; none without models.
    pub local: LocalConfig,
    /// An engine that is asked for what the former cannot do.
    pub render: Option<RenderConfig>,
}

impl Default for Tokenizers {
    fn default() -> Self {
        let pool = PoolConfig { budget: BUDGET, ..PoolConfig::default() };
        Self { local: LocalConfig { pool, ..LocalConfig::default() }, render: None }
    }
}

impl Tokenizers {
    /// Is there a tokenizer in this process?
    #[must_use]
    pub fn has_local(&self) -> bool {
        !self.local.models.is_empty() || self.local.models_dir.is_some()
    }
}

impl IndexerConfig {
    pub(super) fn read_tls(&mut self, root: &Fields<'_>) {
        let fields = root.mapping("grpcTls");
        let mut options = TlsOptions {
            cert_path: fields.nonempty("certPath").map(PathBuf::from),
            client_ca: fields.nonempty("clientCa").map(PathBuf::from),
            ..TlsOptions::default()
        };
        set(&mut options.min_version, fields.parsed("minVersion", tls::version));
        let reload = fields.boolean("reload").unwrap_or(true);
        let self_signed = fields.boolean("selfSigned").unwrap_or_default();
        if self_signed && options.cert_path.is_some() {
            fields.fault("selfSigned", "there is a certPath; give one of them");
        }
        let modes = [("required", false), ("optional", true)];
        let optional = fields.one_of("clientAuth", &modes);
        if optional == Some(true) && options.client_ca.is_none() {
            fields.fault("clientAuth", "optional needs a clientCa");
        }
        set(&mut options.client_optional, optional);
        if self_signed || options.cert_path.is_some() {
            self.grpc_tls = Some(GrpcTls { options, reload });
        } else if options.client_ca.is_some() {
            fields.fault("clientCa", "needs a certPath, or selfSigned: true");
        }
        fields.finish();
    }

    pub(super) fn read_auth(&mut self, root: &Fields<'_>) {
        let fields = root.mapping("auth");
        self.auth.token_file = fields.nonempty("tokenFile").map(PathBuf::from);
        set(&mut self.auth.allow_without_token, fields.boolean("allowWithoutToken"));
        if self.auth.allow_without_token && self.auth.token_file.is_some() {
            fields.fault("allowWithoutToken", "there is a tokenFile; give one of them");
        }
        fields.finish();
    }

    pub(super) fn read_tokenizers(&mut self, root: &Fields<'_>) {
        let fields = root.mapping("tokenizers");
        let local = &mut self.tokenizers.local;
        local.models = fields.take("models", directories).unwrap_or_default();
        local.models_dir = fields.nonempty("modelsDir").map(PathBuf::from);
        local.aliases = fields.strings("aliases").into_iter().collect();
        local.default = fields.nonempty("default");
        let threads = fields.integer("threads", 0..=1024);
        set(&mut local.pool.threads, threads.filter(|&threads: &usize| threads > 0));
        set(&mut local.pool.queue, fields.integer("queue", 1..=1 << 20));
        set(&mut local.pool.budget, fields.millis("budgetMs", 1..=HOUR_MS));
        set(&mut local.cache.bytes, units::bytes(&fields, "cacheBytes", 0..=1 << 40));
        let named = !local.aliases.is_empty() || local.default.is_some();
        if named && !self.tokenizers.has_local() {
            let name = if fields.has("aliases") { "aliases" } else { "default" };
            fields.fault(name, "needs `models` or `modelsDir`");
        }
        let render = fields.mapping("render");
        let [text, multimodal] = RENDER_TIMEOUTS;
        let config = RenderConfig {
            url: render.nonempty("url").unwrap_or_default(),
            model: render.string("model").unwrap_or_default(),
            timeout: render.millis("timeoutMs", 1..=HOUR_MS).unwrap_or(text),
            multimodal_timeout: render
                .millis("multimodalTimeoutMs", 1..=HOUR_MS)
                .unwrap_or(multimodal),
        };
        if render.is_present() && !render.has("url") {
            render.fault("url", "missing; this field is required");
        }
        render.finish();
        self.tokenizers.render = Some(config).filter(|config| !config.url.is_empty());
        fields.finish();
    }
}

/// Served names with directories, which are texts or `{dir: …}`.
fn directories(value: &Value) -> Result<BTreeMap<String, PathBuf>, String> {
    let map = value.as_object().ok_or("expected a mapping of names to directories")?;
    let directory = |(name, value): (&String, &Value)| {
        let dir = match value {
            Value::Object(entry) if entry.keys().eq(["dir"]) => entry.get("dir"),
            other => Some(other),
        };
        match dir.and_then(Value::as_str) {
            Some(dir) if !dir.is_empty() && !name.is_empty() => {
                Ok((name.clone(), PathBuf::from(dir)))
            }
            _ => Err(format!("model {name:?} needs its directory, as a text or as {{dir: text}}")),
        }
    };
    map.iter().map(directory).collect()
}
