//! One line for each scenario, for spreadsheets.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use super::{Report, repeats::quantities};

/// Writes a header and a line for each scenario. A quantity that was not measured is an empty field.
///
/// # Errors
///
/// Those of `out`.
pub fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let measured: Vec<_> = report.scenarios.iter().map(quantities).collect();
    let names: BTreeSet<&String> = measured.iter().flat_map(|of| of.keys()).collect();
    write!(out, "name,policy,level,repeat,seed,valid,requests,errors,incomplete")?;
    for name in &names {
        write!(out, ",{}", quoted(name))?;
    }
    writeln!(out)?;
    for (scenario, measured) in report.scenarios.iter().zip(&measured) {
        let level = scenario.level.map(|level| level.to_string()).unwrap_or_default();
        write!(out, "{},{},{level}", quoted(&scenario.name), quoted(&scenario.policy))?;
        write!(out, ",{},{},{}", scenario.repeat, scenario.seed, scenario.valid)?;
        write!(out, ",{},{},{}", scenario.requests, scenario.errors, scenario.incomplete)?;
        for name in &names {
            let value = measured.get(*name).map(|value| value.to_string()).unwrap_or_default();
            write!(out, ",{value}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// As RFC 4180 has it.
fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}
