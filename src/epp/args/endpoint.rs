//! `--endpoint NAME=IP:PORT[,LABEL=VALUE…]`.

use std::{collections::BTreeMap, net::SocketAddr};

use crate::{
    epp::datalayer::{EndpointInfo, EndpointName},
    support::fields::Fault,
};

/// All endpoints, or every fault.
pub(super) fn parse_all(texts: &[String]) -> Result<Vec<EndpointInfo>, Vec<Fault>> {
    let mut endpoints: Vec<EndpointInfo> = Vec::new();
    let mut faults = Vec::new();
    for text in texts {
        let parsed = parse(text).and_then(|endpoint| {
            if endpoints.iter().any(|known| known.name == endpoint.name) {
                return Err(format!("there is an endpoint named {} already", endpoint.name));
            }
            Ok(endpoint)
        });
        match parsed {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(message) => faults.push(Fault::new("--endpoint", format!("{text:?}: {message}"))),
        }
    }
    if faults.is_empty() { Ok(endpoints) } else { Err(faults) }
}

/// One endpoint. Its name may have a namespace before a slash; it is `default` otherwise.
fn parse(text: &str) -> Result<EndpointInfo, String> {
    const FORM: &str = "must be NAME=IP:PORT, with labels such as ,llm-d.ai/role=decode";
    let (name, rest) = text.split_once('=').ok_or(FORM)?;
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err(format!("the name is missing; {FORM}"));
    }
    let mut parts = rest.split(',');
    let address = parts.next().unwrap_or_default();
    let address: SocketAddr =
        address.parse().map_err(|_| format!("{address:?} is no IP:PORT; {FORM}"))?;
    if address.port() == 0 {
        return Err("the port must be 1 to 65535".to_owned());
    }
    let mut labels = BTreeMap::new();
    for part in parts {
        let (key, value) = part
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| format!("{part:?} is no LABEL=VALUE"))?;
        if labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(format!("label {key} is given twice"));
        }
    }
    let name = EndpointName { namespace: namespace.to_owned(), name: name.to_owned() };
    Ok(EndpointInfo { name, address, metrics_address: address, labels })
}
