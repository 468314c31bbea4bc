//! Facts about the VM that a checkpoint records and a restore needs.

use serde_json::{Value, json};
use thiserror::Error;

use crate::qmp::{QemuVersion, Qmp, QmpError};

/// Most machine types accepted from `query-machines`; QEMU 10.0 lists about 130 with all aliases.
const MAX_MACHINE_TYPES: usize = 4096;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum MachineTypeError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("this QEMU has no machine type `{name}`; see `qemu-system-x86_64 -machine help`")]
    UnknownType { name: String },
    #[error("this QEMU has no default machine type; name one with -machine")]
    NoDefault,
}

/// One row of `query-machines`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineType {
    /// The versioned name, e.g. `pc-q35-10.0`.
    pub name: String,
    /// The short name that means this version in this QEMU, e.g. `q35`.
    pub alias: Option<String>,
    /// The id QEMU gives to the main RAM block, which is its name in a migration stream.
    pub default_ram_id: Option<String>,
    /// Whether QEMU takes it when no type is named.
    pub is_default: bool,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Linux KVM.
    Kvm,
    /// TCG, or another that QMP does not tell apart from it.
    Tcg,
}

impl Accelerator {
    /// The word for `-accel`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What a VM is built of, as far as a restore must rebuild it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFacts {
    /// QEMU's version.
    pub qemu: QemuVersion,
    /// Versioned machine type, e.g. `pc-i440fx-10.0`.
    pub machine_type: String,
    /// Name of the main RAM block of a VM without a memory backend.
    pub default_ram_id: Option<String>,
    /// Id of the `-machine memory-backend=` object, if any: the name of the main RAM block.
    pub ram_backend: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Base memory in bytes, without hot-plugged modules.
    pub ram_bytes: u64,
    /// Hot-plugged memory in bytes.
    pub plugged_bytes: u64,
    /// What runs the guest's code.
    pub accelerator: Accelerator,
    /// Why QEMU itself says that this VM cannot be migrated; empty if it can.
    pub migration_blockers: Vec<String>,
}

impl VmFacts {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer, or lacks something that all supported versions have.
    pub async fn read(qmp: &Qmp) -> Result<Self, MachineTypeError> {
        let machine_type = machine_type(qmp).await?;
        let types = machine_types(qmp).await?;
        let own = types.iter().find(|known| known.name == machine_type);
        let cpus = qmp.execute_json("query-cpus-fast", Value::Null).await?;
        let memory = qmp.execute_json("query-memory-size-summary", Value::Null).await?;
        let kvm = qmp.execute_json("query-kvm", Value::Null).await?;
        let migration = qmp.execute_json("query-migrate", Value::Null).await?;
        Ok(Self {
            qemu: qmp.version().clone(),
            default_ram_id: own.and_then(|own| own.default_ram_id.clone()),
            machine_type,
            ram_backend: ram_backend(qmp).await?,
            vcpus: u32::try_from(cpus.as_array().map_or(0, Vec::len)).unwrap_or(u32::MAX),
            ram_bytes: memory["base-memory"].as_u64().unwrap_or(0),
            plugged_bytes: memory["plugged-memory"].as_u64().unwrap_or(0),
            accelerator: if kvm["enabled"] == true { Accelerator::Kvm } else { Accelerator::Tcg },
            migration_blockers: strings(&migration["blocked-reasons"]),
        })
    }
}

/// What a VM has besides devices, RAM blocks and disks, and can gain or lose while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Composition {
    /// QOM path and thread of each vCPU.
    vcpus: Vec<(String, u64)>,
    /// Bytes.
    base_memory: u64,
    plugged_memory: u64,
    /// Why QEMU says that this VM cannot be migrated now.
    pub migration_blockers: Vec<String>,
}

impl Composition {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        let cpus = qmp.execute_json("query-cpus-fast", Value::Null).await?;
        let memory = qmp.execute_json("query-memory-size-summary", Value::Null).await?;
        let migration = qmp.execute_json("query-migrate", Value::Null).await?;
        let vcpu = |row: &Value| {
            (
                row["qom-path"].as_str().unwrap_or_default().to_owned(),
                row["thread-id"].as_u64().unwrap_or(0),
            )
        };
        Ok(Self {
            vcpus: cpus.as_array().into_iter().flatten().map(vcpu).collect(),
            base_memory: memory["base-memory"].as_u64().unwrap_or(0),
            plugged_memory: memory["plugged-memory"].as_u64().unwrap_or(0),
            migration_blockers: strings(&migration["blocked-reasons"]),
        })
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX)
    }

    /// What differs, in words.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.vcpus != now.vcpus {
            return Some(format!("it has {} vCPUs, and had {}", now.vcpus.len(), self.vcpus.len()));
        }
        if (self.base_memory, self.plugged_memory) != (now.base_memory, now.plugged_memory) {
            return Some(format!(
                "{} bytes of memory are plugged in, and {} were",
                now.plugged_memory, self.plugged_memory
            ));
        }
        let blocker =
            now.migration_blockers.iter().find(|why| !self.migration_blockers.contains(why));
        blocker.map(|why| format!("QEMU says since then that its state cannot be saved: {why}"))
    }
}

async fn machine_type(qmp: &Qmp) -> Result<String, QmpError> {
    let reply = qom_get(qmp, "/machine", "type").await?;
    match reply.as_str().and_then(|name| name.strip_suffix("-machine")) {
        Some(name) => Ok(name.into()),
        None => Err(QmpError::unexpected("qom-get /machine type", "a machine type", &reply)),
    }
}

/// QEMU answers with a path such as `/objects/pc.ram`; the name without `memory-backend=` is empty
/// or generated.
async fn ram_backend(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    match qom_get(qmp, "/machine", "memory-backend").await {
        Ok(reply) => {
            let id =
                reply.as_str().and_then(|path| path.rsplit('/').next()).filter(|id| !id.is_empty());
            Ok(id.map(Into::into))
        }
        // Some VMs (`none`, microvm variants) lack the property.
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) async fn qom_get(qmp: &Qmp, path: &str, property: &str) -> Result<Value, QmpError> {
    qmp.execute_json("qom-get", json!({ "path": path, "property": property })).await
}

fn strings(value: &Value) -> Vec<String> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|item| item.as_str().map(Into::into)).collect()
}

/// The machine types of this QEMU; works on a `-machine none` one too, so before the real VM
/// exists.
///
/// # Errors
/// When QEMU does not answer.
pub async fn machine_types(qmp: &Qmp) -> Result<Vec<MachineType>, QmpError> {
    let reply = qmp.execute_json("query-machines", Value::Null).await?;
    match reply.as_array() {
        Some(list) if list.len() <= MAX_MACHINE_TYPES => {
            Ok(list.iter().filter_map(parse_machine_type).collect())
        }
        _ => Err(QmpError::unexpected("query-machines", "a list of machine types", &reply)),
    }
}

fn parse_machine_type(row: &Value) -> Option<MachineType> {
    let text = |field: &str| row[field].as_str().map(Into::into);
    Some(MachineType {
        name: text("name")?,
        alias: text("alias"),
        default_ram_id: text("default-ram-id"),
        is_default: row["is-default"] == true,
    })
}

/// Finds what `-machine name` means: a versioned name, an alias, or the default for `None`.
///
/// # Errors
/// When there is no type of that name, or no default.
pub fn resolve<'a>(
    types: &'a [MachineType],
    name: Option<&str>,
) -> Result<&'a MachineType, MachineTypeError> {
    let Some(name) = name else {
        return types.iter().find(|known| known.is_default).ok_or(MachineTypeError::NoDefault);
    };
    let found =
        types.iter().find(|known| known.name == name || known.alias.as_deref() == Some(name));
    found.ok_or_else(|| MachineTypeError::UnknownType { name: name.into() })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn aliases_and_the_default_resolve_to_versioned_names() {
        let rows = json!([
            {"name": "pc-q35-10.0", "alias": "q35", "default-ram-id": "pc.ram"},
            {"name": "pc-i440fx-10.0", "alias": "pc", "is-default": true, "default-ram-id": "pc.ram"},
            {"name": "pc-i440fx-7.2"}, {"no": "name"},
        ]);
        let types: Vec<_> =
            rows.as_array().expect("list").iter().filter_map(parse_machine_type).collect();
        assert_eq!(types.len(), 3);
        let name = |wanted| resolve(&types, wanted).map(|found| found.name.clone()).ok();
        assert_eq!(name(Some("q35")).as_deref(), Some("pc-q35-10.0"));
        assert_eq!(name(None).as_deref(), Some("pc-i440fx-10.0"));
        assert_eq!(name(Some("pc-i440fx-7.2")).as_deref(), Some("pc-i440fx-7.2"));
        assert!(
            resolve(&types, Some("virt")).is_err_and(|error| error.to_string().contains("`virt`"))
        );
    }
}
