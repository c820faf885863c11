//! `kv-indexer`'s command line.

use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::{
    Parser, Subcommand,
    builder::{OsStringValueParser, TypedValueParser},
};

use crate::{
    indexer::{
        config::{Flags, IndexerConfig},
        explain::Explain,
    },
    ingest::fleet::PodDeclaration,
    support::{
        fields::Fault,
        telemetry::{LogFormat, check_level},
    },
    tokenize::command::TokenizeArgs,
};

/// Exit status for a bad command line or configuration (`EX_USAGE` of sysexits).
pub const EX_USAGE: u8 = 64;

/// Indexes the KV-cache events of an LLM fleet and serves prefix scores.
#[derive(Clone, Debug, Parser)]
#[command(name = "kv-indexer", version, about)]
pub struct Args {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Configuration file, YAML or JSON; without one, the defaults hold.
    #[arg(long, env = "KV_INDEXER_CONFIG", value_name = "FILE", value_parser = any_path())]
    pub config: Option<PathBuf>,
    /// Check the configuration, print every fault and warning, and exit.
    #[arg(long)]
    pub check: bool,
    /// Address of the gRPC API, such as 127.0.0.1:50051; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS")]
    pub grpc_listen: Option<SocketAddr>,
    /// Address of metrics, health and configuration; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS")]
    pub admin_listen: Option<SocketAddr>,
    /// A pod to subscribe to; may be given several times, and replaces the file's `pods`.
    #[arg(long = "pod", value_name = "POD")]
    pub pods: Vec<String>,
    /// File with further pods, watched for changes.
    #[arg(long, value_name = "FILE")]
    pub pods_file: Option<PathBuf>,
    /// Tokens per block of models that the file does not list, 1 to 65536.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub block_size: Option<u32>,
    /// A running indexer, http://host:port, whose index this one begins with.
    #[arg(long, value_name = "URL", value_parser = parse_peer)]
    pub bootstrap_from: Option<String>,
    /// Log lines as text or json.
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log level, such as info, or by module, such as info,hyper=warn.
    #[arg(long, value_name = "LEVEL", value_parser = parse_level)]
    pub log_level: Option<String>,
}

/// Commands that end by themselves.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Prints the token ids of prompts.
    Tokenize(TokenizeArgs),
    /// Says why a pod scores a prompt as it does.
    Explain(Box<Explain>),
}

/// What to do after the command line and the configuration are read.
#[derive(Debug)]
pub enum Start {
    /// Run with this configuration.
    Run(Box<IndexerConfig>),
    /// End with this status; everything has been said.
    Exit(u8),
}

impl Args {
    /// Parses a command line, the program's name first. Help, version and errors are printed.
    ///
    /// # Errors
    ///
    /// The exit status: 0 after help and version, [`EX_USAGE`] after an error.
    pub fn from_command_line<I, T>(line: I) -> Result<Self, u8>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        Self::try_parse_from(line).map_err(|error| {
            // A closed output is no reason to fail differently.
            error.print().unwrap_or_default();
            if error.use_stderr() { EX_USAGE } else { 0 }
        })
    }

    /// Reads the configuration file and applies the flags. `parse_pod` understands `--pod`.
    ///
    /// # Errors
    ///
    /// Every fault of the flags, or else of the file.
    pub fn load(
        &self,
        parse_pod: impl Fn(&str) -> Result<PodDeclaration, String>,
    ) -> Result<IndexerConfig, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut pods = Vec::new();
        for text in &self.pods {
            match parse_pod(text) {
                Ok(pod) => pods.push(pod),
                Err(message) => faults.push(Fault::new("--pod", format!("{text:?}: {message}"))),
            }
        }
        let flags = Flags {
            pods,
            pods_file: self.pods_file.clone(),
            grpc_listen: self.grpc_listen,
            admin_listen: self.admin_listen,
            block_size: self.block_size,
            log_format: self.log_format,
            log_level: self.log_level.clone(),
            bootstrap_from: self.bootstrap_from.clone(),
        };
        let text = match self.config_path().map(read).transpose() {
            Ok(text) => text.unwrap_or_default(),
            Err(fault) => {
                faults.push(fault);
                return Err(faults);
            }
        };
        match IndexerConfig::parse(&text, &flags) {
            Ok(config) if faults.is_empty() => Ok(config),
            Ok(_) => Err(faults),
            Err(more) => {
                faults.extend(more);
                Err(faults)
            }
        }
    }

    /// Loads the configuration and says on `out` and `err` what is to be said: with `--check`, that
    /// it is valid, and the warnings; without, nothing unless there are faults. Warnings of a
    /// configuration that runs are left to the log.
    pub fn start(
        &self,
        parse_pod: impl Fn(&str) -> Result<PodDeclaration, String>,
        out: &mut dyn Write,
        err: &mut dyn Write,
    ) -> Start {
        let (said, status) = match self.load(parse_pod) {
            Ok(config) if self.check => (say_valid(&config, out), 0),
            Ok(config) => return Start::Run(Box::new(config)),
            Err(faults) => (self.say_faults(&faults, err), EX_USAGE),
        };
        // Whoever closed our output still gets the status.
        said.unwrap_or_default();
        Start::Exit(status)
    }

    /// The file to read. A variable that is set to nothing names none.
    fn config_path(&self) -> Option<&Path> {
        self.config.as_deref().filter(|path| !path.as_os_str().is_empty())
    }

    fn say_faults(&self, faults: &[Fault], err: &mut dyn Write) -> io::Result<()> {
        let file: &dyn Display = match self.config_path() {
            Some(path) => &path.display(),
            None => &"command line",
        };
        let count = faults.len();
        let noun = if count == 1 { "fault" } else { "faults" };
        writeln!(err, "kv-indexer: {file}: {count} {noun} in the configuration")?;
        faults.iter().try_for_each(|fault| writeln!(err, "  {fault}"))
    }
}

fn say_valid(config: &IndexerConfig, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "configuration is valid")?;
    config.warnings.iter().try_for_each(|warning| writeln!(out, "warning: {warning}"))
}

fn read(path: &Path) -> Result<String, Fault> {
    std::fs::read_to_string(path)
        .map_err(|error| Fault::new("--config", format!("reading {}: {error}", path.display())))
}

/// Unlike clap's own parser, takes an empty path.
fn any_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// A peer's address: plain HTTP/2, as indexers of one cluster speak to each other.
fn parse_peer(text: &str) -> Result<String, String> {
    let uri: http::Uri = text.parse().map_err(|error| format!("{error}"))?;
    if uri.scheme_str() != Some("http") || uri.port_u16().is_none() {
        return Err("write it like http://10.0.0.1:50051".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_level(text: &str) -> Result<String, String> {
    check_level(text).map(|()| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_pod(text: &str) -> Result<PodDeclaration, String> {
        let (id, endpoint) = text.split_once('=').ok_or("no `=`")?;
        Ok(PodDeclaration {
            pod: id.to_owned(),
            endpoint: endpoint.to_owned(),
            ..PodDeclaration::default()
        })
    }

    /// Status (`None`: it would run), standard output and error.
    fn start(line: &[&str]) -> (Option<u8>, String, String) {
        let args = Args::from_command_line([&["kv-indexer"], line].concat()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = match args.start(parse_pod, &mut out, &mut err) {
            Start::Run(_) => None,
            Start::Exit(status) => Some(status),
        };
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn flags_go_before_the_file() {
        let file = file(
            "grpcListen: 127.0.0.1:1\nadminListen: 127.0.0.1:2\nlog: {format: json, level: warn}\n\
             tokenProcessorConfig: {blockSizeTokens: 32}\npodsFile: a.yaml\n\
             models: [{name: m, blockSizeTokens: 8}, {name: n}]\n\
             pods: [{id: old, endpoint: 'tcp://h:1'}]\n",
        );
        let path = file.path().to_str().unwrap();
        let line = "--grpc-listen 127.0.0.1:0 --admin-listen [::1]:3 --log-format text --log-level \
                    debug --block-size 64 --pods-file b.yaml --pod a=tcp://h:1 --pod b=tcp://h:2";
        let mut words = vec!["kv-indexer", "--config", path];
        words.extend(line.split(' '));
        let config = Args::from_command_line(words).unwrap().load(parse_pod).unwrap();
        assert_eq!(config.grpc_listen.to_string(), "127.0.0.1:0");
        assert_eq!(config.admin_listen.to_string(), "[::1]:3");
        assert_eq!((config.log_format, config.log_level.as_str()), (LogFormat::Text, "debug"));
        let models = &config.api.models;
        let size = |name| models.scheme(name).block_size();
        assert_eq!((size("other"), size("m"), size("n")), (64, 8, 64));
        assert_eq!(config.pods_file, Some("b.yaml".into()));
        let names: Vec<_> = config.ingest.pods.iter().map(|pod| pod.pod.as_str()).collect();
        assert_eq!(names, ["a", "b"]);

        let config = Args::from_command_line(["kv-indexer", "--config", path]).unwrap();
        assert_eq!(config.load(parse_pod).unwrap().ingest.pods[0].pod, "old");
    }

    #[test]
    fn check_says_valid_and_warns() {
        assert_eq!(start(&["--check"]), (Some(0), "configuration is valid\n".into(), "".into()));
        let file = file("kvBlockIndexConfig: {enableMetrics: true}");
        let (status, out, err) = start(&["--check", "--config", file.path().to_str().unwrap()]);
        assert_eq!((status, err.as_str()), (Some(0), ""));
        assert!(out.contains("valid\nwarning: kvBlockIndexConfig.enableMetrics: "), "{out}");
        assert_eq!(start(&[]).0, None);
        assert_eq!(start(&["--config", ""]).0, None);
    }

    #[test]
    fn every_fault_is_said_with_or_without_check() {
        let file = file("drainMs: -1\nbanana: 1\n");
        let path = file.path().to_str().unwrap();
        for more in [&["--check"][..], &[]] {
            let line = [&["--config", path, "--pod", "x", "--pod", "y=udp://h"], more].concat();
            let (status, out, err) = start(&line);
            assert_eq!((status, out.as_str()), (Some(EX_USAGE), ""));
            for part in ["4 faults", "line 1: drainMs", "line 2: banana", "\"x\": no", "udp"] {
                assert!(err.contains(part), "{part} is not in {err}");
            }
        }
        let (status, _, err) = start(&["--config", "/nonexistent/kv.yaml"]);
        assert_eq!(status, Some(EX_USAGE));
        assert!(err.contains("reading /nonexistent/kv.yaml"), "{err}");
    }

    #[test]
    fn a_bad_command_line_has_its_status() {
        for line in [
            &["--block-size", "0"][..],
            &["--log-level", "loud"],
            &["--grpc-listen", ":50051"],
            &["--nonsense"],
        ] {
            let line = [&["kv-indexer"], line].concat();
            assert_eq!(Args::from_command_line(line).unwrap_err(), EX_USAGE);
        }
        assert_eq!(Args::from_command_line(["kv-indexer", "--version"]).unwrap_err(), 0);
    }
}
