//! Who used the tracker of a QEMU last.
//!
//! The kernel's marks of written pages are one set for one QEMU. A machine that is attached under another name, or from
//! another runtime directory, takes and settles them for itself, and the first one would go on as if they were its own.
//! So whoever attaches leaves its sign in QEMU (an object that does nothing) and believes its `marks.json` only if the
//! sign is still there, alone.

use crate::runtime::{MachineFile, RuntimeDir};
use anyhow::{Context, Result};
use qmp_bridge::Qmp;
use serde_json::json;

const PREFIX: &str = "stillpoint-at-";
const DIGEST_LETTERS: usize = 16;

/// To be called before a tracker is used.
pub async fn claim(qmp: &Qmp, runtime: &RuntimeDir, file: &MachineFile) -> Result<()> {
    let own = sign(runtime, file);
    let objects = qmp.execute_json("qom-list", json!({ "path": "/objects" })).await.context("asking QEMU for its objects")?;
    let names = objects.as_array().into_iter().flatten().filter_map(|object| object["name"].as_str());
    let signs: Vec<&str> = names.filter(|name| name.starts_with(PREFIX)).collect();
    if signs == [own.as_str()] {
        return Ok(());
    }
    runtime.forget_exact_marks()?;
    for sign in signs {
        qmp.execute_json("object-del", json!({ "id": sign })).await.context("taking an earlier helper's sign out of QEMU")?;
    }
    let object = json!({ "qom-type": "throttle-group", "id": own });
    qmp.execute_json("object-add", object).await.context("leaving a sign in QEMU").map(drop)
}

fn sign(runtime: &RuntimeDir, file: &MachineFile) -> String {
    let digest = blake3::hash(format!("{}\n{}", runtime.path().display(), file.instance).as_bytes()).to_hex();
    format!("{PREFIX}{}", &digest[..DIGEST_LETTERS])
}
