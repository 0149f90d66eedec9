//! `{% generation %}` … `{% endgeneration %}`: which part of a rendered chat an assistant wrote.
//!
//! The tag is an extension of `transformers`, unknown to the template engine. A filter block is a
//! block tag like it, so the source is rewritten before it is compiled: the keyword alone changes,
//! `{%- generation -%}` becomes `{%- filter MARK -%}`, and whitespace control, scopes and errors
//! stay those of a block tag. The filter puts a marker before and one after the text, and
//! [`take_marks`] turns the markers into spans. They are noncharacters, which no text may contain.

use std::ops::Range;

/// The filter that marks a text.
pub(super) const FILTER: &str = "__firebrick_generation";
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// The characters that mark spans.
pub(super) const MARKERS: [char; 2] = [OPEN, CLOSE];

/// What the filter does.
pub(super) fn mark(text: &str) -> String {
    format!("{OPEN}{text}{CLOSE}")
}

/// The text without markers, and the byte ranges they enclosed; none if they are nested.
pub(super) fn take_marks(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut open = None;
    for character in marked.chars() {
        match (character, open) {
            (OPEN, None) => open = Some(text.len()),
            (CLOSE, Some(start)) => {
                spans.push(start..text.len());
                open = None;
            }
            (OPEN | CLOSE, _) => return None,
            _ => text.push(character),
        }
    }
    open.is_none().then_some((text, spans))
}

/// The source with generation tags rewritten; none if it has none.
///
/// Tags are found as Jinja's lexer finds them: not in comments, not in raw blocks, not in strings
/// of expressions. A source that is not well formed is left for the engine to complain about.
pub(super) fn rewrite(source: &str) -> Option<String> {
    let mut rewritten = String::with_capacity(source.len());
    let (mut at, mut copied, mut found) = (0, 0, false);
    while let Some((open, kind)) = next_tag(source, at) {
        let inside = open + 2;
        at = match kind {
            '#' => find_after(source, inside, "#}")?,
            '{' => end_of_expression(source, inside, "}}")?,
            _ => {
                let word = keyword(source, inside);
                let replacement = match &source[word.clone()] {
                    "generation" => Some(format!("filter {FILTER}")),
                    "endgeneration" => Some("endfilter".to_string()),
                    _ => None,
                };
                if let Some(replacement) = replacement {
                    rewritten.push_str(&source[copied..word.start]);
                    rewritten.push_str(&replacement);
                    copied = word.end;
                    found = true;
                }
                let end = end_of_expression(source, word.end, "%}")?;
                match &source[word] {
                    "raw" => end_of_raw(source, end)?,
                    _ => end,
                }
            }
        };
    }
    rewritten.push_str(&source[copied..]);
    found.then_some(rewritten)
}

/// Where the next tag opens, and its second character.
fn next_tag(source: &str, from: usize) -> Option<(usize, char)> {
    let bytes = source.as_bytes();
    (from..bytes.len().saturating_sub(1)).find_map(|at| {
        let second = bytes[at + 1];
        (bytes[at] == b'{' && matches!(second, b'{' | b'%' | b'#')).then_some((at, second as char))
    })
}

fn find_after(source: &str, from: usize, needle: &str) -> Option<usize> {
    Some(from + source[from..].find(needle)? + needle.len())
}

/// The first word of a block tag, after whitespace control.
fn keyword(source: &str, inside: usize) -> Range<usize> {
    let rest = &source[inside..];
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest).trim_start();
    let start = source.len() - rest.len();
    let length = rest
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(rest.len());
    start..start + length
}

/// Behind the `close` that ends an expression: one that is in no string and no bracket.
fn end_of_expression(source: &str, from: usize, close: &str) -> Option<usize> {
    let bytes = source.as_bytes();
    let (mut at, mut depth, mut quote) = (from, 0usize, None);
    while at < bytes.len() {
        let byte = bytes[at];
        match quote {
            Some(_) if byte == b'\\' => at += 1,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if depth == 0 && source.as_bytes()[at..].starts_with(close.as_bytes()) => {
                return Some(at + close.len());
            }
            None => match byte {
                b'"' | b'\'' => quote = Some(byte),
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            },
        }
        at += 1;
    }
    None
}

/// Behind the `{% endraw %}` that ends a raw block.
fn end_of_raw(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let inside = find_after(source, at, "{%")?;
        let word = keyword(source, inside);
        if &source[word.clone()] == "endraw" {
            return end_of_expression(source, word.end, "%}");
        }
        at = inside;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).unwrap_or_else(|| source.to_string())
    }

    #[test]
    fn r5_only_the_keyword_changes() {
        let source = "a {%-  generation   -%}\nb{% generation%}{%+endgeneration -%} c";
        let wanted =
            format!("a {{%-  filter {FILTER}   -%}}\nb{{% filter {FILTER}%}}{{%+endfilter -%}} c");
        assert_eq!(rewritten(source), wanted);
    }

    #[test]
    fn r5_what_only_looks_like_a_tag_stays() {
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ {'a': {'b': \"}} {% generation %}\"}} }}",
            "{% raw %}{% generation %}{% endgeneration %}{%- endraw %}",
            "{% set generation = 1 %}{{ generation }}",
            "{% set x = '%} {% generation %}' %}",
            "{% generations %}",
            "{{ 'it\\'s {% generation %}' }}",
            "no tags at all",
            "{% generation",
            "{{ unclosed {% generation %}",
        ] {
            assert_eq!(rewrite(source), None, "{source}");
        }
        let source = "{% raw %}{{{% endraw %}{% generation %}x{% endgeneration %}";
        assert!(rewritten(source).contains(&format!("{{% filter {FILTER} %}}x{{% endfilter %}}")));
    }

    #[test]
    fn r5_marks_become_spans() {
        let marked = format!("é{}b{}", mark("ü"), mark(""));
        let spans = take_marks(&marked).unwrap();
        assert_eq!(spans, ("éüb".to_string(), vec![2..4, 5..5]));
        assert_eq!(take_marks(&mark(&mark("x"))), None);
        assert_eq!(take_marks("\u{fdd1}"), None);
        assert_eq!(take_marks("\u{fdd0}"), None);
    }
}
