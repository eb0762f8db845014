//! Texts of a peer: how much of them is kept. They end in reports and in what an agent is told of its VMM, where there is little room.

/// Characters of one text. Reasons of this build, with all their causes, stay far below.
const MOST_CHARACTERS: usize = 1000;

/// Characters of all reasons of one message: a processor that lacks a hundred features is still told in full.
const MOST_TOGETHER: usize = 4 * MOST_CHARACTERS;

/// What stands for the rest.
const REST: char = '…';

/// Cuts a text that nobody would read to its end: 1000 characters are left.
pub fn shorten(text: &mut String) {
    if let Some((end, _)) = text.char_indices().nth(MOST_CHARACTERS) {
        text.truncate(end);
        text.push(REST);
        text.shrink_to_fit();
    }
}

/// Cuts each of some reasons, and leaves out the last ones of too many.
pub(crate) fn shorten_all(texts: &mut Vec<String>) {
    /// What stands between two reasons, so that empty ones are not without end.
    const BETWEEN: usize = 2;

    let mut left = MOST_TOGETHER;
    let fit = texts.iter_mut().position(|text| {
        shorten(text);
        match left.checked_sub(text.chars().count() + BETWEEN) {
            Some(after) => left = after,
            None => return true,
        }
        false
    });
    if let Some(fit) = fit {
        texts.truncate(fit);
        texts.push(REST.to_string());
        texts.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let mut text = "é".repeat(3000);
        shorten(&mut text);
        assert_eq!(text, "é".repeat(1000) + "…");
    }

    #[test]
    fn a_text_that_fits_stays_as_it_is() {
        let mut text = "x".repeat(1000);
        shorten(&mut text);
        assert_eq!(text, "x".repeat(1000));
    }

    #[test]
    fn of_too_many_reasons_the_first_ones_are_kept() {
        let mut many = vec![String::new(); 100_000];
        shorten_all(&mut many);
        assert_eq!(many.len(), 2001);
        assert_eq!(many.last().map(String::as_str), Some("…"));
    }

    #[test]
    fn reasons_that_fit_stay_as_they_are() {
        let reasons: Vec<String> = (0..100).map(|bit| format!("CPU feature {bit} is missing")).collect();
        let mut kept = reasons.clone();
        shorten_all(&mut kept);
        assert_eq!(kept, reasons);
    }
}
