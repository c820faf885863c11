//! `kv-indexer explain`: asks a running indexer why a pod scores a prompt as it does.
//!
//! # Exit status
//!
//! 0 when the pod holds every full block of the prompt, 2 when it does not, 1 when there is no answer.

use std::{
    io::{self, Write},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use clap::{ArgGroup, Parser};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::{
    codegen::Service,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::{
    proto::kvindexer::{
        self as pb, kv_indexer_client::KvIndexerClient, prompt::Input as PromptInput,
    },
    support::{
        access::Tokens,
        tls::{ClientTls, Identity, client_config_as},
    },
};

/// The pod lacks some block.
const EX_MISSING: u8 = 2;

/// Says why a pod scores a prompt as it does.
///
/// Exit status: 0 when the pod holds every full block of the
/// prompt, 2 when it does not, 1 when there is no answer.
#[derive(Clone, Debug, Parser)]
#[command(group = ArgGroup::new("kind").args(["text", "chat", "token_ids"]))]
pub struct Explain {
    /// Model name, as in requests.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// File with the prompt; - reads standard input.
    #[arg(long, value_name = "FILE")]
    pub prompt_file: PathBuf,
    /// The pod.
    #[arg(long, value_name = "NAME")]
    pub pod: String,
    /// LoRA adapter.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub lora: String,
    /// Cache salt of the request.
    #[arg(long, value_name = "SALT", default_value = "")]
    pub cache_salt: String,
    /// The file is plain text, all of it; this is the default.
    #[arg(long)]
    pub text: bool,
    /// The file is the JSON body of a chat completion request.
    #[arg(long)]
    pub chat: bool,
    /// The file has token ids: numbers, between which are commas, blanks and brackets.
    #[arg(long)]
    pub token_ids: bool,
    /// The indexer: host:port, or http://… or https://….
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    pub server: String,
    /// Speak TLS, as https:// does.
    #[arg(long)]
    pub tls: bool,
    /// Certificates that are trusted, PEM. Default: the system's.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The name that the server's certificate has to have. Default: the server's.
    #[arg(long, value_name = "NAME")]
    pub tls_server_name: Option<String>,
    /// Trust any certificate.
    #[arg(long)]
    pub tls_insecure_skip_verify: bool,
    /// Our certificate and its key, PEM, for a server that asks.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// See --tls-cert.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// File with a token, for a server that wants one; the first line counts.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// How long it may take, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    pub timeout_ms: u32,
}

impl Explain {
    /// Asks, says the answer on `out` or what went wrong on `err`, and returns the exit status.
    pub fn run(&self, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let answer = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(self.ask()));
        // A closed output changes nothing about the status.
        match answer {
            Ok(answer) => {
                self.say(&answer, out).unwrap_or_default();
                if holds_all(&answer) { 0 } else { EX_MISSING }
            }
            Err(error) => {
                writeln!(err, "kv-indexer: explain: {error:#}").unwrap_or_default();
                1
            }
        }
    }

    /// Asks the server.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, a server that cannot be reached, or its refusal.
    pub async fn ask(&self) -> anyhow::Result<pb::ExplainResponse> {
        let prompt = self.prompt()?;
        let request = pb::ScoreRequest {
            model: self.model.clone(),
            lora: self.lora.clone(),
            prompts: vec![prompt],
            ..pb::ScoreRequest::default()
        };
        let timeout = Duration::from_millis(self.timeout_ms.into());
        let asking = async {
            let mut client = KvIndexerClient::new(self.connect(timeout).await?)
                .max_encoding_message_size(usize::MAX)
                .max_decoding_message_size(usize::MAX);
            let request = pb::ExplainRequest { request: Some(request), pod: self.pod.clone() };
            let mut request = tonic::Request::new(request);
            if let Some(authorization) = self.authorization()? {
                request.metadata_mut().insert("authorization", authorization);
            }
            let answer = client.explain(request).await;
            let refused = |status: tonic::Status| {
                anyhow::anyhow!("{:?}: {}", status.code(), status.message())
            };
            anyhow::Ok(answer.map_err(refused)?.into_inner())
        };
        let late = || format!("{} did not answer within {timeout:?}", self.server);
        tokio::time::timeout(timeout, asking).await.with_context(late)?
    }

    fn authorization(&self) -> anyhow::Result<Option<MetadataValue<Ascii>>> {
        let tokens = self.token_file.as_deref().map(Tokens::read).transpose()?;
        Ok(tokens.map(|tokens| tokens.authorization().parse()).transpose()?)
    }

    fn prompt(&self) -> anyhow::Result<pb::Prompt> {
        let text = if self.prompt_file.as_os_str() == "-" {
            io::read_to_string(io::stdin())
        } else {
            std::fs::read_to_string(&self.prompt_file)
        };
        let text = text.with_context(|| format!("reading {}", self.prompt_file.display()))?;
        let input = if self.chat {
            PromptInput::ChatJson(text)
        } else if self.token_ids {
            let ids = ids(&text).with_context(|| self.prompt_file.display().to_string())?;
            PromptInput::TokenIds(pb::TokenIds { ids })
        } else {
            PromptInput::Text(text)
        };
        Ok(pb::Prompt {
            input: Some(input),
            cache_salt: self.cache_salt.clone(),
            ..pb::Prompt::default()
        })
    }

    async fn connect(&self, timeout: Duration) -> anyhow::Result<Channel> {
        let (scheme, address) = self.server.split_once("://").unwrap_or(("", &self.server));
        let tls = match scheme {
            // Who says how to trust the server means TLS.
            "" | "http" => {
                self.tls
                    || self.tls_insecure_skip_verify
                    || self.tls_ca.is_some()
                    || self.tls_server_name.is_some()
                    || self.tls_cert.is_some()
            }
            "https" => true,
            other => anyhow::bail!("{other}:// is not spoken; give host:port, http:// or https://"),
        };
        let at = || format!("connecting to {}", self.server);
        // tonic speaks no TLS of its own here, so the connector does and the scheme is http's.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(at)?
            .connect_timeout(timeout);
        if !tls {
            return endpoint.connect().await.with_context(at);
        }
        let trust = ClientTls {
            ca: self.tls_ca.clone(),
            insecure_skip_verify: self.tls_insecure_skip_verify,
        };
        let identity = self
            .tls_cert
            .clone()
            .zip(self.tls_key.clone())
            .map(|(chain, key)| Identity { chain, key });
        let config = client_config_as(&trust, identity.as_ref(), &[b"h2"])?;
        let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = self.tls_server_name.clone().unwrap_or(host);
        let name = ServerName::try_from(name).context("the server's name")?;
        let connector = Connector { config: Arc::new(config), name };
        endpoint.connect_with_connector(connector).await.with_context(at)
    }

    fn say(&self, answer: &pb::ExplainResponse, out: &mut dyn Write) -> io::Result<()> {
        let scores = answer.scores.clone().unwrap_or_default();
        let (total, size) = (scores.total_blocks, scores.block_size);
        writeln!(out, "prompt: {total} full blocks of {size} tokens")?;
        for pod in &scores.pods {
            let rank = pod.dp_rank.map_or_else(String::new, |rank| format!("#{rank}"));
            let tiers: Vec<String> =
                pod.tiers.iter().map(|tier| format!("{} {}", tier.tier, tier.depth)).collect();
            let tiers =
                if tiers.is_empty() { String::new() } else { format!(" ({})", tiers.join(", ")) };
            let state = pod.state().as_str_name().trim_start_matches("POD_STATE_").to_lowercase();
            writeln!(
                out,
                "{}{rank}: score {}, {} blocks, {} of them by events{tiers}, {state}",
                pod.pod, pod.score, pod.depth, pod.confirmed_depth
            )?;
        }
        if answer.first_missing_block < total {
            let holders = match answer.holders.as_slice() {
                [] => "nobody".to_owned(),
                holders => holders.join(", "),
            };
            writeln!(
                out,
                "first missing block: {}; held by {holders}",
                answer.first_missing_block
            )?;
        }
        answer.findings.iter().try_for_each(|finding| writeln!(out, "* {finding}"))
    }
}

/// Does some rank of the pod hold every full block, and is there one?
fn holds_all(answer: &pb::ExplainResponse) -> bool {
    let total = answer.scores.as_ref().map_or(0, |scores| scores.total_blocks);
    total > 0 && answer.first_missing_block >= total
}

/// Numbers between commas, blanks and brackets.
fn ids(text: &str) -> anyhow::Result<Vec<u32>> {
    let words = text.split(|c: char| c.is_whitespace() || ",[]".contains(c));
    let words = words.filter(|word| !word.is_empty());
    words
        .map(|word| {
            let shown: String = word.chars().take(20).collect();
            word.parse().with_context(|| format!("{shown:?} is no token id"))
        })
        .collect()
}

/// TCP, then TLS.
#[derive(Clone)]
struct Connector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Self { config, name } = self.clone();
        Box::pin(async move {
            let host = to.host().unwrap_or_default().trim_matches(['[', ']']);
            let stream = TcpStream::connect((host, to.port_u16().unwrap_or(443))).await?;
            let secured = TlsConnector::from(config).connect(name, stream).await?;
            Ok(TokioIo::new(secured))
        })
    }
}
