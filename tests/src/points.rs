//! The kill points, as strings of their own.

/// Every point at which a helper can be made to die, in the order in which they are passed.
pub fn kill_points() -> Vec<String> {
    engine::kill_point::POINTS.iter().map(|point| (*point).to_owned()).collect()
}
