//! QEMU's migration capabilities and parameters: what a stream needs, what was found, and putting
//! that back.
//!
//! The rule for capabilities is simple because most change the stream's form or need a second
//! party: all are off but those that the mode needs. They are changed in one command, since QEMU
//! judges the resulting set and some exclude each other. Parameters that this QEMU does not list do
//! not exist in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{MigrationError, StreamMode};
use crate::qmp::{Qmp, QmpError};

/// As fast as it goes. What is above it makes each session's value its own, see
/// [`Settings::is_ours`].
const UNLIMITED: u64 = 1 << 40;
const MAX_BANDWIDTH: &str = "max-bandwidth";
pub(super) const DOWNTIME_LIMIT: &str = "downtime-limit";
pub(super) const BACKGROUND_SNAPSHOT: &str = "background-snapshot";

/// A value that was found and the one that replaced it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Change<T> {
    pub(super) found: T,
    pub(super) set: T,
}

/// All that a session changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) capabilities: BTreeMap<String, Change<bool>>,
    pub(super) parameters: BTreeMap<String, Change<Value>>,
}

fn wanted_capabilities(mode: StreamMode) -> [&'static str; 2] {
    match mode {
        StreamMode::BackgroundSnapshot => ["events", BACKGROUND_SNAPSHOT],
        StreamMode::PreCopy => ["events", "pause-before-switchover"],
    }
}

impl Settings {
    /// What has to be changed for `mode`; changes nothing.
    pub(super) async fn survey(
        qmp: &Qmp,
        mode: StreamMode,
        downtime_ms: u64,
    ) -> Result<Self, MigrationError> {
        let capabilities = capability_changes(qmp, mode).await?;
        let found = qmp.execute_json("query-migrate-parameters", Value::Null).await?;
        let mut parameters = BTreeMap::new();
        for (name, wanted) in wanted_parameters(&found, downtime_ms) {
            match found.get(name) {
                Some(value) if *value != wanted => {
                    parameters
                        .insert(name.to_owned(), Change { found: value.clone(), set: wanted });
                }
                _ => {}
            }
        }
        Ok(Self { capabilities, parameters })
    }

    /// Capabilities first: what they are decides which parameters are allowed.
    pub(super) async fn apply(&self, qmp: &Qmp) -> Result<(), QmpError> {
        set_capabilities(
            qmp,
            self.capabilities.iter().map(|(name, change)| (name.as_str(), change.set)),
        )
        .await?;
        set_parameters(
            qmp,
            self.parameters.iter().map(|(name, change)| (name.as_str(), &change.set)),
        )
        .await
    }

    /// Restores the values that were there before, in reverse order. A setting that another client
    /// has changed since keeps its value. Repeatable.
    pub(super) async fn put_back(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let found = qmp.execute_json("query-migrate-parameters", Value::Null).await?;
        let ours = self.marks(&found);
        let parameters = self.parameters.iter().filter(|(name, change)| {
            let now = &found[name.as_str()];
            // The switch-over policy moves one of them, so equality is asked of others' sessions
            // only.
            *now != change.found && (ours || *now == change.set)
        });
        set_parameters(qmp, parameters.map(|(name, change)| (name.as_str(), &change.found)))
            .await?;
        let now = capabilities(qmp).await?;
        let changed =
            self.capabilities.iter().filter(|(name, change)| now.get(*name) == Some(&change.set));
        set_capabilities(qmp, changed.map(|(name, change)| (name.as_str(), change.found))).await
    }

    /// Whether the migration that QEMU has, or had last, was started with these settings: its
    /// bandwidth limit is a number that no other client would choose.
    pub(super) async fn is_ours(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        Ok(self.marks(&qmp.execute_json("query-migrate-parameters", Value::Null).await?))
    }

    fn marks(&self, found: &Value) -> bool {
        self.parameters.get(MAX_BANDWIDTH).is_some_and(|change| found[MAX_BANDWIDTH] == change.set)
    }
}

pub(super) async fn capabilities(qmp: &Qmp) -> Result<BTreeMap<String, bool>, QmpError> {
    let reply = qmp.execute_json("query-migrate-capabilities", Value::Null).await?;
    let row = |row: &Value| Some((row["capability"].as_str()?.to_owned(), row["state"].as_bool()?));
    Ok(reply.as_array().into_iter().flatten().filter_map(row).collect())
}

pub(super) async fn capability_changes(
    qmp: &Qmp,
    mode: StreamMode,
) -> Result<BTreeMap<String, Change<bool>>, MigrationError> {
    let found = capabilities(qmp).await?;
    let wanted = wanted_capabilities(mode);
    if let Some(missing) = wanted.iter().find(|name| !found.contains_key(**name)) {
        let why = format!("QEMU {} has no migration capability `{missing}`", qmp.version());
        return Err(MigrationError::Unsupported { mode, why });
    }
    let change = |(name, found): (String, bool)| {
        let set = wanted.contains(&name.as_str());
        (found != set).then_some((name, Change { found, set }))
    };
    Ok(found.into_iter().filter_map(change).collect())
}

fn wanted_parameters(found: &Value, downtime_ms: u64) -> Vec<(&'static str, Value)> {
    let mut wanted = vec![
        (MAX_BANDWIDTH, json!(UNLIMITED + distinction())),
        (DOWNTIME_LIMIT, json!(downtime_ms)),
        // The stream goes to the helper on this host through a socket pair, and the helper does not
        // do a TLS handshake.
        ("tls-creds", json!("")),
        // Since 8.2; another mode would not be a live migration.
        ("mode", json!("normal")),
        // Since 9.0; a fixed estimate would mislead the switch-over.
        ("avail-switchover-bandwidth", json!(0)),
    ];
    if found["zero-page-detection"] == "none" {
        wanted.push(("zero-page-detection", json!("legacy")));
    }
    wanted
}

/// A number that differs from session to session.
fn distinction() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    1 + (u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 8) % (1 << 32)
}

pub(super) async fn set_capabilities<'a>(
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

async fn set_parameters<'a>(
    qmp: &Qmp,
    values: impl Iterator<Item = (&'a str, &'a Value)>,
) -> Result<(), QmpError> {
    let values: serde_json::Map<String, Value> =
        values.map(|(name, value)| (name.to_owned(), value.clone())).collect();
    if values.is_empty() {
        return Ok(());
    }
    qmp.execute_json("migrate-set-parameters", Value::Object(values)).await.map(drop)
}

pub(super) async fn set_downtime_limit(qmp: &Qmp, milliseconds: u64) -> Result<(), QmpError> {
    qmp.execute_json("migrate-set-parameters", json!({ DOWNTIME_LIMIT: milliseconds }))
        .await
        .map(drop)
}
