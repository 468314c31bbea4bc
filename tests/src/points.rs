//! The kill points, from the list in the program's own source.

use crate::built::project;

/// Every point at which a helper can be made to die, in the order in which they are passed.
pub fn kill_points() -> Vec<String> {
    let source = std::fs::read_to_string(project().join("engine/src/kill_point.rs")).expect("the list of kill points");
    let list = source.split("POINTS: &[&str] = &[").nth(1).and_then(|rest| rest.split("];").next()).expect("the list of kill points");
    let points: Vec<String> = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(points.len() >= 8 && points.contains(&"freeze.paused".to_owned()), "{points:?}");
    points
}
