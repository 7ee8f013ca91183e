"""The printed table of a dataset report."""

from lit_rlhf.data.report import DatasetReport


def test_report_is_an_aligned_table():
    report = DatasetReport("rows.json")
    report.num_read = 1100
    for number in range(6):
        report.skip("chosen equals rejected", f"rows.json row {number + 5}")
    report.flag("completion cut to 9 tokens", "rows.json row 1")
    report.add_line("end")
    assert report.format_table() == (
        "rows.json\n"
        "rows read                               1,100\n"
        "  skipped: chosen equals rejected           6  first: rows.json row 5\n"
        "rows kept                               1,094\n"
        "  of these: completion cut to 9 tokens      1  first: rows.json row 1\n"
        "end"
    )
    assert report.format_summary() == "rows read 1,100 · kept 1,094 · 6 chosen equals rejected"
