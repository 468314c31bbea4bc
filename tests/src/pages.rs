//! Tables of the pages in docs/, as far as tests hold them against the program.

use crate::built::project;

/// The first cell of each row of the tables below a heading of a page of docs/, up to the next
/// heading.
pub fn first_cells(page: &str, heading: &str) -> Vec<String> {
    rows(page, heading).into_iter().filter_map(|cells| cells.into_iter().next()).collect()
}

/// The cells of each row of those tables.
pub fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(project().join("docs").join(page))
        .unwrap_or_else(|error| panic!("docs/{page}: {error}"));
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines
        .iter()
        .position(|line| line.starts_with('#') && line.trim_start_matches('#').trim() == heading);
    let begin = begin.unwrap_or_else(|| panic!("docs/{page} has no heading '{heading}'"));
    let table = lines[begin + 1..].iter().take_while(|line| !line.starts_with('#'));
    let table: Vec<&&str> = table.filter(|line| line.starts_with('|')).collect();
    // A row of dashes follows each head.
    let is_head = |at: usize| {
        table[at].starts_with("| ---")
            || table.get(at + 1).is_some_and(|next| next.starts_with("| ---"))
    };
    let numbers = (0..table.len()).filter(|at| !is_head(*at));
    numbers
        .map(|at| {
            table[at].trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

/// What a cell lists: parts between commas and semicolons, but not inside parentheses or
/// backquotes.
pub fn items(cell: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut depth, mut is_code) = (0_u32, false);
    for letter in cell.chars() {
        match letter {
            '`' => is_code = !is_code,
            '(' if !is_code => depth += 1,
            ')' if !is_code => depth = depth.saturating_sub(1),
            _ => {}
        }
        match parts.last_mut() {
            Some(part) if !matches!(letter, ',' | ';') || is_code || depth > 0 => part.push(letter),
            _ => parts.push(String::new()),
        }
    }
    parts.iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn page_items_are_split_outside_of_parentheses_and_code() {
        assert_eq!(items("`a, b`, c (d, e); f"), ["`a, b`", "c (d, e)", "f"]);
    }
}
