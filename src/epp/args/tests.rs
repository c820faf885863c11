use serde_json::json;

use super::*;

fn parse(line: &[&str]) -> Args {
    match Args::parse_line([&["epp"], line].concat()) {
        Ok(args) => args,
        Err(error) => panic!("{line:?}: {error}"),
    }
}

#[test]
fn defaults_are_gos() {
    let args = parse(&[]);
    assert_eq!((args.grpc_port, args.grpc_health_port, args.metrics_port), (9002, 9003, 9090));
    assert_eq!(args.drain_timeout, Duration::from_secs(30));
    assert_eq!(args.refresh_metrics_interval, Duration::from_millis(50));
    assert_eq!(args.refresh_prometheus_metrics_interval, Duration::from_secs(5));
    assert_eq!(args.metrics_staleness_threshold, Duration::from_secs(2));
    assert!(args.secure_serving && !args.health_checking && !args.enable_cert_reload);
    assert!(!args.allow_experimental_plugins && !args.emit_endpoint_scores && !args.check);
    assert!(!args.disable_endpoint_subset_filter && !args.enable_grpc_stream_metrics);
    assert_eq!((args.pool_name(), args.log_level().as_str()), ("epp", "info"));
    assert_eq!((args.log_format(), args.bind_address), (LogFormat::Text, None));
    assert_eq!((args.grpc_max_recv_msg_size, args.cert_path()), (None, None));
    assert_eq!(args.unknown_metrics, UnknownMetrics::AsWorst);
    assert_eq!(parse(&["--unknownMetrics", "idle"]).unknown_metrics, UnknownMetrics::AsIdle);
    assert_eq!((args.tls_min_version, args.tls_cipher_suites.usable.len()), (TlsVersion::Tls12, 0));
    assert_eq!((args.faults(), args.warnings()), (vec![], vec![]));
    assert!(args.default_parameters().is_empty());
}

#[test]
fn every_spelling_is_read() {
    #[track_caller]
    fn check(line: &str, want: (u16, bool, Option<&str>, i64)) {
        let args = parse(&line.split(' ').collect::<Vec<_>>());
        let got =
            (args.grpc_port, args.secure_serving, args.config_file.as_deref(), args.verbosity);
        assert_eq!(got, want, "{line}");
    }
    check("--grpc-port 1 --secure-serving=false --config-file x -v 4", (1, false, Some("x"), 4));
    check("--grpc-port=1 --secure-serving --config-file=x -v=4", (1, true, Some("x"), 4));
    check("--grpcPort 1 --secureServing=false --configFile x --v=4", (1, false, Some("x"), 4));
    check("-grpcPort=1 -secureServing=false -configFile x --v 4", (1, false, Some("x"), 4));
    check("-grpc-port 1 -secure-serving=F -config-file=x -v4", (1, false, Some("x"), 4));
    check("--grpc-port 1 --grpc-port 2 --secure-serving=0 --secure-serving", (2, true, None, 2));
    check("--secure-serving false --grpc-port 1", (1, false, None, 2));
    check("--config-file -odd --v -1", (9002, true, Some("-odd"), -1));
    check("--config-file=a=b", (9002, true, Some("a=b"), 2));
    check("--config-file=", (9002, true, None, 2));
}

#[test]
fn all_flags_of_every_release_are_read() {
    let go = "--grpc-port=1 --grpc-health-port=2 --metrics-port=3 --pool-name=p --pool-namespace=n \
              --pool-group=g --endpoint-target-ports=8000,8001 --config-file=f \
              --allow-experimental-plugins --disable-endpoint-subset-filter --emit-endpoint-scores \
              --refresh-metrics-interval=1s --refresh-prometheus-metrics-interval=1m \
              --metrics-staleness-threshold=3s --ha-enable-leader-election --drain-timeout=1m30s \
              --grpc-max-recv-msg-size=10MiB --grpc-max-send-msg-size=25MB --secure-serving \
              --cert-path=/c --enable-cert-reload --tls-min-version=VersionTLS13 \
              --tls-cipher-suites=TLS_AES_128_GCM_SHA256 --health-checking --enable-pprof --tracing \
              --enable-grpc-stream-metrics --metrics-endpoint-auth=false \
              --metrics-client-ca-file=a --metrics-cert-dir=b --zap-encoder=json --zap-devel \
              --zap-log-level=debug --zap-stacktrace-level=panic --zap-time-encoding=iso8601 \
              --total-queued-requests-metric=q --total-running-requests-metric=r \
              --kv-cache-usage-percentage-metric=k --lora-info-metric=l --cache-info-metric=c \
              --model-server-metrics-port=9 --model-server-metrics-path=/m \
              --model-server-metrics-scheme=https \
              --model-server-metrics-https-insecure-skip-verify=false --kubeconfig=k";
    let args = parse(&go.split_whitespace().collect::<Vec<_>>());
    assert_eq!(args.faults(), []);
    assert_eq!(
        (args.grpc_max_recv_msg_size, args.grpc_max_send_msg_size),
        (Some(10 << 20), Some(25_000_000))
    );
    assert_eq!((args.drain_timeout.as_secs(), args.pool_name()), (90, "p"));
    assert_eq!((args.pool_namespace().as_str(), args.cert_path()), ("n", Some(Path::new("/c"))));
    assert_eq!(args.tls_min_version, TlsVersion::Tls13);
    assert_eq!(tls::cipher_suites("TLS_AES_128_GCM_SHA256").as_ref(), Ok(&args.tls_cipher_suites));
    assert_eq!(
        (args.log_format(), args.log_level().as_str()),
        (LogFormat::Json, "info,kv_indexer=debug,epp=debug")
    );
    assert_eq!(
        args.default_parameters(),
        [
            (
                "metrics-data-source",
                json!({"port": 9, "path": "/m", "scheme": "https", "insecureSkipVerify": false})
            ),
            (
                "core-metrics-extractor",
                json!({"engineConfigs": [{
                    "name": "vllm", "queuedRequestsSpec": "q", "runningRequestsSpec": "r",
                    "kvUsageSpec": "k", "loraSpec": "l", "cacheInfoSpec": "c",
                }]})
            ),
        ]
    );

    let old = "--grpcPort 1 --grpcHealthPort 2 --metricsPort 3 --poolName p --poolNamespace n \
               --configText {} --secureServing=false --healthChecking --certPath c \
               --refreshMetricsInterval 50ms --refreshPrometheusMetricsInterval 5s \
               --destinationEndpointHintKey x-gateway-destination-endpoint \
               --destinationEndpointHintMetadataNamespace envoy.lb --modelServerMetricsPort 9 \
               --modelServerMetricsPath /m --modelServerMetricsScheme http \
               --modelServerMetricsHttpsInsecureSkipVerify --totalQueuedRequestsMetric q \
               --kvCacheUsagePercentageMetric k --loraInfoMetric l --enablePprof=false";
    let args = parse(&old.split_whitespace().collect::<Vec<_>>());
    assert_eq!(args.faults(), []);
    let warned: Vec<String> = args.warnings();
    assert_eq!(warned.len(), 4, "{warned:#?}");
    assert!(warned.iter().all(|text| text.contains("engineConfigs") || text.contains("cert-path")));
}

#[test]
fn what_has_no_effect_is_said() {
    #[track_caller]
    fn check(line: &str, want: &[&str]) {
        let warnings = parse(&line.split(' ').collect::<Vec<_>>()).warnings();
        assert_eq!(warnings.len(), want.len(), "{warnings:#?}");
        for (warning, part) in warnings.iter().zip(want) {
            assert!(warning.contains(part), "{part} is not in {warning}");
        }
    }
    check("--tracing --enable-pprof", &["--enable-pprof: ", "--tracing: has no effect: traces"]);
    check("--tracing=false --enable-pprof=false --ha-enable-leader-election=false", &[]);
    check("--ha-enable-leader-election=true", &["there is no leader election"]);
    check("--metrics-endpoint-auth", &["open to whoever"]);
    check("--metrics-cert-dir=d --metrics-client-ca-file=f", &["plain HTTP", "plain HTTP"]);
    check("--refresh-metrics-interval=1ms", &["50ms is taken"]);
    check("--enable-cert-reload", &["without --cert-path"]);
    check("--tls-min-version=VersionTLS10", &["VersionTLS12 is taken"]);
    check(
        "--tls-cipher-suites=TLS_RSA_WITH_RC4_128_SHA,TLS_AES_128_GCM_SHA256",
        &["TLS_RSA_WITH_RC4_128_SHA is not built in"],
    );
    check("--destination-endpoint-hint-key=x-other", &["always x-gateway-destination-endpoint"]);
    check("--lora-info-metric=x", &["--lora-info-metric: deprecated"]);
    check("--pool-group=x --kubeconfig=y", &["Kubernetes is not built", "Kubernetes is not built"]);
    check("--secure-serving true", &["write --secure-serving=true"]);
}

#[test]
fn faults_of_flags_are_worded_as_gos() {
    #[track_caller]
    fn check(line: &str, want: &[&str]) {
        let faults = parse(&line.split(' ').collect::<Vec<_>>()).faults();
        assert_eq!(faults.len(), want.len(), "{faults:#?}");
        for (fault, part) in faults.iter().zip(want) {
            assert!(fault.to_string().contains(part), "{part} is not in {fault}");
        }
    }
    check(
        "--pool-name=p --endpoint-selector=app=x --endpoint-target-ports=1",
        &["--endpoint-selector: either pool-name or endpoint-selector must be set"],
    );
    check(
        "--endpoint-selector=app=x",
        &["flag \"endpoint-target-ports\" should have length from 1 to 8"],
    );
    check("--endpoint-selector=a --endpoint-target-ports=1,1,2,3,4,5,6,7,8", &[]);
    check("--endpoint-selector=a --endpoint-target-ports=1,2,3,4,5,6,7,8,9", &["from 1 to 8"]);
    check(
        "--endpoint-target-ports=8000,70000",
        &["invalid port number 70000 in \"endpoint-target-ports\""],
    );
    check(
        "--config-file=a --config-text=b",
        &["both the \"config-file\" and \"config-text\" flags cannot be set at the same time"],
    );
    check(
        "--metrics-client-ca-file=f",
        &["\"metrics-client-ca-file\" requires \"metrics-cert-dir\""],
    );
    check("--debug-listen=0.0.0.0:1", &["no loopback address"]);
    check("--debug-listen=127.0.0.1:0", &[]);
    check("--zap-encoder=xml --zap-log-level=loud", &["json or console", "--zap-log-level"]);
    check("--model-server-metrics-scheme=ftp", &["http or https"]);
}

#[test]
fn a_bad_command_line_has_its_status() {
    for line in [
        &["--grpc-port", "70000"][..],
        &["--grpc-port"],
        &["--secure-serving=maybe"],
        &["--drain-timeout", "30"],
        &["--drain-timeout=-1s"],
        &["--grpc-max-recv-msg-size=1X"],
        &["--bind-address", "localhost"],
        &["--debug-listen", ":1"],
        &["--log-format", "yaml"],
        &["--unknown-metrics", "hopeful"],
        &["--tls-min-version=1.2"],
        &["--tls-cipher-suites=X,TLS_AES_128_GCM_SHA256"],
        &["--tls-cipher-suites=TLS_RSA_WITH_RC4_128_SHA"],
        &["--nonsense"],
        &["-x"],
        &["word"],
        &["--", "--grpc-port=1"],
    ] {
        let line = [&["epp"], line].concat();
        assert_eq!(Args::from_command_line(&line).unwrap_err(), EX_USAGE, "{line:?}");
    }
    assert_eq!(Args::from_command_line(["epp", "--version"]).unwrap_err(), 0);
    let help = Args::parse_line(["epp", "--help"]).unwrap_err();
    assert!(!help.use_stderr());
    let text = help.to_string();
    for part in
        ["--grpc-port <PORT>", "--endpoint <NAME=IP:PORT[,LABEL=VALUE…]>", "--secure-serving"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn verbosity_becomes_a_level() {
    #[track_caller]
    fn check(line: &[&str], want: &str) {
        assert_eq!(parse(line).log_level(), want, "{line:?}");
        assert_eq!(crate::support::telemetry::check_level(want), Ok(()));
    }
    check(&["-v", "0"], "warn");
    check(&["-v", "1"], "info");
    check(&["-v", "-7"], "info");
    check(&["-v", "4"], "info,kv_indexer=debug,epp=debug");
    check(&["-v", "9"], "info,kv_indexer=trace,epp=trace");
    check(&["-v", "9", "--zap-log-level", "error"], "error");
    check(&["-v", "0", "--zap-log-level=5"], "info,kv_indexer=trace,epp=trace");
}

#[test]
fn endpoints_are_read() {
    let args = parse(&["--endpoint", "a=127.0.0.1:8000", "--endpoint=ns/b=[::1]:8001,x=y=z"]);
    let names: Vec<String> =
        args.endpoints().unwrap().0.iter().map(|endpoint| endpoint.name.to_string()).collect();
    assert_eq!(names, ["default/a", "ns/b"]);
    let faults = parse(&["--endpoint=a=1.2.3.4:1", "--endpoint=a=1.2.3.4"]).faults();
    assert_eq!(faults.len(), 1, "{faults:?}");
    let text = "--endpoint: \"a=1.2.3.4\": \"1.2.3.4\" is no IP:PORT";
    assert!(faults[0].to_string().starts_with(text), "{}", faults[0]);
}
