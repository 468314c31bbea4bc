//! Capabilities and parameters of a move: what it needs on either side, and what the source had
//! before.
//!
//! Every other capability is off: most change the form of the stream or need a second party. They
//! are set in one command, since QEMU judges the set that results.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{BitmapMap, LocalMigrationError};
use crate::qmp::{Qmp, QmpError};

/// As fast as it goes; a socket on one host has no neighbours to spare.
const BANDWIDTH: u64 = 1 << 36;
const BITMAP_MAPPING: &str = "block-bitmap-mapping";
/// Parameters that a move sets; one that QEMU does not list does not exist in it.
const PARAMETERS: [&str; 6] = [
    "max-bandwidth",
    "downtime-limit",
    "tls-creds",
    "mode",
    "avail-switchover-bandwidth",
    BITMAP_MAPPING,
];

/// No return path: after a migration that failed QEMU 7.2 continues to announce one in each later
/// stream (seen). We ask the destination ourselves whether it has everything.
const SOURCE: [&str; 2] = ["events", "pause-before-switchover"];
const DESTINATION: [&str; 2] = ["events", "late-block-activate"];
const BITMAPS: &str = "dirty-bitmaps";

/// What the source had, to be put back if it continues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl Found {
    /// Asks; changes nothing.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        let all = qmp.execute_json("query-migrate-parameters", Value::Null).await?;
        let kept = |name: &&str| Some(((*name).to_owned(), all.get(*name)?.clone()));
        Ok(Self {
            capabilities: capabilities(qmp).await?,
            parameters: PARAMETERS.iter().filter_map(kept).collect(),
        })
    }

    /// Repeatable. QEMU cannot unset `block-bitmap-mapping` once it was set: it becomes an empty
    /// mapping then.
    ///
    /// # Errors
    /// When QEMU refuses a setting.
    pub async fn put_back(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let now = Self::read(qmp).await?;
        let mut parameters = self.parameters.clone();
        if now.parameters.contains_key(BITMAP_MAPPING) && !parameters.contains_key(BITMAP_MAPPING) {
            parameters.insert(BITMAP_MAPPING.into(), json!([]));
        }
        parameters.retain(|name, value| now.parameters.get(name) != Some(value));
        set_parameters(qmp, parameters).await?;
        let changed = self
            .capabilities
            .iter()
            .filter(|(name, state)| now.capabilities.get(*name).is_some_and(|now| now != *state));
        set_capabilities(qmp, changed.map(|(name, state)| (name.as_str(), *state))).await
    }
}

/// `found` is the source's, whose list of names decides what is there to be turned off.
pub(super) async fn apply_to_source(
    qmp: &Qmp,
    found: &Found,
    bitmaps: &BitmapMap,
    downtime_ms: u64,
) -> Result<(), LocalMigrationError> {
    apply_capabilities(qmp, &found.capabilities, &SOURCE, bitmaps).await?;
    let wanted = [
        ("max-bandwidth", json!(BANDWIDTH)),
        ("downtime-limit", json!(downtime_ms)),
        // Both ends are on this host, and TLS would need a name to check.
        ("tls-creds", json!("")),
        ("mode", json!("normal")),
        ("avail-switchover-bandwidth", json!(0)),
    ];
    let known = wanted.into_iter().filter(|(name, _)| found.parameters.contains_key(*name));
    let mut parameters: Map<String, Value> =
        known.map(|(name, value)| (name.to_owned(), value)).collect();
    parameters.retain(|name, value| found.parameters.get(name) != Some(value));
    if !bitmaps.is_empty() {
        parameters.insert(BITMAP_MAPPING.into(), bitmaps.for_source());
    }
    Ok(set_parameters(qmp, parameters).await?)
}

pub(super) async fn apply_to_destination(
    qmp: &Qmp,
    bitmaps: &BitmapMap,
) -> Result<(), LocalMigrationError> {
    apply_capabilities(qmp, &capabilities(qmp).await?, &DESTINATION, bitmaps).await?;
    if !bitmaps.is_empty() {
        let parameters = Map::from_iter([(BITMAP_MAPPING.to_owned(), bitmaps.for_destination())]);
        set_parameters(qmp, parameters).await?;
    }
    Ok(())
}

async fn apply_capabilities(
    qmp: &Qmp,
    found: &BTreeMap<String, bool>,
    wanted: &[&'static str],
    bitmaps: &BitmapMap,
) -> Result<(), LocalMigrationError> {
    let wanted = || wanted.iter().copied().chain((!bitmaps.is_empty()).then_some(BITMAPS));
    if let Some(name) = wanted().find(|name| !found.contains_key(*name)) {
        return Err(LocalMigrationError::Missing { version: qmp.version().to_string(), name });
    }
    let states = found
        .iter()
        .map(|(name, now)| (name.as_str(), *now, wanted().any(|wanted| wanted == name)));
    let changes = states.filter(|(_, now, then)| now != then).map(|(name, _, then)| (name, then));
    Ok(set_capabilities(qmp, changes).await?)
}

async fn capabilities(qmp: &Qmp) -> Result<BTreeMap<String, bool>, QmpError> {
    let reply = qmp.execute_json("query-migrate-capabilities", Value::Null).await?;
    let row = |row: &Value| Some((row["capability"].as_str()?.to_owned(), row["state"].as_bool()?));
    Ok(reply.as_array().into_iter().flatten().filter_map(row).collect())
}

async fn set_capabilities<'a>(
    qmp: &Qmp,
    states: impl Iterator<Item = (&'a str, bool)>,
) -> Result<(), QmpError> {
    let list: Vec<Value> =
        states.map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    if list.is_empty() {
        return Ok(());
    }
    qmp.execute_json("migrate-set-capabilities", json!({ "capabilities": list })).await.map(drop)
}

pub(super) async fn set_downtime_limit(qmp: &Qmp, milliseconds: u64) -> Result<(), QmpError> {
    set_parameters(qmp, Map::from_iter([("downtime-limit".to_owned(), json!(milliseconds))])).await
}

async fn set_parameters(qmp: &Qmp, parameters: Map<String, Value>) -> Result<(), QmpError> {
    if parameters.is_empty() {
        return Ok(());
    }
    qmp.execute_json("migrate-set-parameters", Value::Object(parameters)).await.map(drop)
}
