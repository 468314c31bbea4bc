//! QEMU's migration capabilities and parameters: what was found, what a migration needs, and
//! putting back what was found.
//!
//! The rule for capabilities is simple because most change the stream's form or need a second
//! party: all are off but those that the migration needs. They are changed in one command, since
//! QEMU judges the resulting set and some exclude each other. Parameters that this QEMU does not
//! list do not exist in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::MigrationError;
use crate::qmp::{Qmp, QmpError};

pub(super) const BACKGROUND_SNAPSHOT: &str = "background-snapshot";
const DIRTY_BITMAPS: &str = "dirty-bitmaps";
const MAX_BANDWIDTH: &str = "max-bandwidth";
const DOWNTIME_LIMIT: &str = "downtime-limit";
const ZERO_PAGE_DETECTION: &str = "zero-page-detection";
const BITMAP_MAPPING: &str = "block-bitmap-mapping";
/// The parameters that a migration may change.
const PARAMETERS: [&str; 7] = [
    MAX_BANDWIDTH,
    DOWNTIME_LIMIT,
    "tls-creds",
    "mode",
    "avail-switchover-bandwidth",
    ZERO_PAGE_DETECTION,
    BITMAP_MAPPING,
];

/// A row of `query-migrate-capabilities`.
#[derive(Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

/// What a migration needs.
#[derive(Debug, Default)]
pub(super) struct Wanted<'a> {
    pub(super) capabilities: Vec<&'a str>,
    pub(super) parameters: Vec<(&'a str, Value)>,
}

impl<'a> Wanted<'a> {
    /// By a QEMU that sends a running VM to a process on this host, as fast as it goes.
    /// `max_bandwidth` (bytes per second) is a number that no other client would choose: by it
    /// [`Settings::is_ours`] knows whose migration QEMU has.
    pub(super) fn live(
        capabilities: &[&'a str],
        max_bandwidth: u64,
        downtime_limit_ms: u64,
    ) -> Self {
        let parameters = vec![
            (MAX_BANDWIDTH, json!(max_bandwidth)),
            (DOWNTIME_LIMIT, json!(downtime_limit_ms)),
            // Both ends are on this host. A helper does no TLS handshake, and of another QEMU the
            // name would have to be checked.
            ("tls-creds", json!("")),
            // Since 8.2; another mode would not be a live migration.
            ("mode", json!("normal")),
            // Since 8.2; a fixed estimate would mislead the switch-over.
            ("avail-switchover-bandwidth", json!(0)),
            // Since 9.0. With `none`, each page of zeros is sent, and gets memory where it arrives.
            (ZERO_PAGE_DETECTION, json!("legacy")),
        ];
        Self { capabilities: capabilities.to_vec(), parameters }
    }

    /// The same, with dirty bitmaps.
    pub(super) fn with_bitmaps(mut self, mapping: Option<Value>) -> Self {
        if let Some(mapping) = mapping {
            self.capabilities.push(DIRTY_BITMAPS);
            self.parameters.push((BITMAP_MAPPING, mapping));
        }
        self
    }
}

/// What a QEMU's migration was set to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    capabilities: BTreeMap<String, bool>,
    /// Those that a migration may change.
    parameters: BTreeMap<String, Value>,
}

impl Found {
    /// Asks; changes nothing.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        let rows: Vec<Capability> = qmp.query("query-migrate-capabilities", Value::Null).await?;
        let capabilities = rows.into_iter().map(|row| (row.capability, row.state));
        Ok(Self { capabilities: capabilities.collect(), parameters: parameters(qmp).await? })
    }

    /// What has to be changed for `wanted`, if this QEMU has all its capabilities.
    pub(super) fn plan(&self, qmp: &Qmp, wanted: Wanted) -> Result<Settings, MigrationError> {
        let is_missing = |name: &&&str| !self.capabilities.contains_key(**name);
        match wanted.capabilities.iter().find(is_missing) {
            None => Ok(self.changes(wanted)),
            Some(name) => {
                let (version, name) = (qmp.version().to_string(), (*name).to_owned());
                Err(MigrationError::Missing { version, name })
            }
        }
    }

    /// Whether it is switched on.
    pub(super) fn has(&self, capability: &str) -> bool {
        self.capabilities.get(capability).copied().unwrap_or_default()
    }

    /// Gives another QEMU the same, as far as it knows them.
    ///
    /// # Errors
    /// When QEMU refuses a setting.
    pub async fn give_to(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let mut parameters = self.parameters.clone();
        parameters.entry(BITMAP_MAPPING.into()).or_insert_with(|| json!([]));
        let is_on = self.capabilities.iter().filter(|(_, is_on)| **is_on);
        let wanted = Wanted {
            capabilities: is_on.map(|(name, _)| name.as_str()).collect(),
            parameters: parameters.iter().map(|(name, to)| (name.as_str(), to.clone())).collect(),
        };
        Self::read(qmp).await?.changes(wanted).apply(qmp).await
    }

    /// What has to be changed, of capabilities that are there.
    pub(super) fn changes(&self, wanted: Wanted) -> Settings {
        let mut settings = Settings::default();
        for (name, &found) in &self.capabilities {
            let set = wanted.capabilities.contains(&name.as_str());
            if found != set {
                settings.capabilities.insert(name.clone(), Change { found, set });
            }
        }
        for (name, set) in wanted.parameters {
            let found = match self.parameters.get(name) {
                // `multifd` is what `legacy` is, as that capability is off.
                Some(found) if name == ZERO_PAGE_DETECTION && found != "none" => continue,
                Some(found) => found.clone(),
                // QEMU lists it only once it was set, and cannot unset it.
                None if name == BITMAP_MAPPING => json!([]),
                None => continue,
            };
            if found != set {
                settings.parameters.insert(name.to_owned(), Change { found, set });
            }
        }
        settings
    }
}

/// A value that was found and the one that replaced it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Change<T> {
    pub(super) found: T,
    pub(super) set: T,
}

/// All that a migration changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) capabilities: BTreeMap<String, Change<bool>>,
    pub(super) parameters: BTreeMap<String, Change<Value>>,
}

impl Settings {
    /// Those of a migration whose bitmaps are not known any more.
    pub(super) fn with_unknown_bitmaps(mut self, found: &Found) -> Self {
        if let Some(&found) = found.capabilities.get(DIRTY_BITMAPS) {
            self.capabilities.insert(DIRTY_BITMAPS.into(), Change { found, set: !found });
        }
        let found = found.parameters.get(BITMAP_MAPPING).cloned().unwrap_or_else(|| json!([]));
        self.parameters.insert(BITMAP_MAPPING.into(), Change { found, set: Value::Null });
        self
    }

    /// Capabilities first: what they are decides which parameters are allowed.
    pub(super) async fn apply(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let states = self.capabilities.iter().map(|(name, change)| (name.as_str(), change.set));
        set_capabilities(qmp, states.collect()).await?;
        let values =
            self.parameters.iter().map(|(name, change)| (name.clone(), change.set.clone()));
        set_parameters(qmp, values.collect()).await
    }

    /// Restores the values that were there before, in reverse order. A setting that another client
    /// has changed since keeps its value. Repeatable.
    pub(super) async fn put_back(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let now = Found::read(qmp).await?;
        let ours = self.marks(&now.parameters);
        let values = self.parameters.iter().filter_map(|(name, change)| {
            let value = now.parameters.get(name)?;
            // The downtime policy moves one of them, so equality is asked of others' migrations
            // only.
            let is_changed = *value != change.found && (ours || *value == change.set);
            is_changed.then(|| (name.clone(), change.found.clone()))
        });
        set_parameters(qmp, values.collect()).await?;
        let states = self.capabilities.iter().filter_map(|(name, change)| {
            let is_changed = now.capabilities.get(name) == Some(&change.set);
            is_changed.then_some((name.as_str(), change.found))
        });
        set_capabilities(qmp, states.collect()).await
    }

    /// Whether the migration that QEMU has, or had last, was started with these settings.
    pub(super) async fn is_ours(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        Ok(self.marks(&parameters(qmp).await?))
    }

    fn marks(&self, now: &BTreeMap<String, Value>) -> bool {
        let change = self.parameters.get(MAX_BANDWIDTH);
        // It is not changed only where an earlier migration of ours left it.
        change.is_none_or(|change| now.get(MAX_BANDWIDTH) == Some(&change.set))
    }
}

async fn parameters(qmp: &Qmp) -> Result<BTreeMap<String, Value>, QmpError> {
    let mut all: BTreeMap<String, Value> =
        qmp.query("query-migrate-parameters", Value::Null).await?;
    all.retain(|name, _| PARAMETERS.contains(&name.as_str()));
    Ok(all)
}

/// Arguments of `migrate-set-capabilities`.
pub(super) fn capability_list(states: &[(&str, bool)]) -> Value {
    let row = |(name, state): &(&str, bool)| json!({ "capability": name, "state": state });
    json!({ "capabilities": states.iter().map(row).collect::<Vec<_>>() })
}

pub(super) async fn set_capabilities(qmp: &Qmp, states: Vec<(&str, bool)>) -> Result<(), QmpError> {
    if states.is_empty() {
        return Ok(());
    }
    qmp.execute_json("migrate-set-capabilities", capability_list(&states)).await.map(drop)
}

async fn set_parameters(qmp: &Qmp, values: Map<String, Value>) -> Result<(), QmpError> {
    if values.is_empty() {
        return Ok(());
    }
    qmp.execute_json("migrate-set-parameters", Value::Object(values)).await.map(drop)
}

pub(super) async fn set_parameter(qmp: &Qmp, name: &str, value: Value) -> Result<(), QmpError> {
    set_parameters(qmp, Map::from_iter([(name.to_owned(), value)])).await
}

pub(super) async fn set_downtime_limit(qmp: &Qmp, milliseconds: u64) -> Result<(), QmpError> {
    set_parameter(qmp, DOWNTIME_LIMIT, json!(milliseconds)).await
}
